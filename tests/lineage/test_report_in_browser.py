"""The report as a browser shows it: nothing sticks out, nothing complains, and the figures are the manifests'."""

import json
import shutil

import pytest

from trivium.lineage.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="THE REPORT IS NOT CHECKED IN A BROWSER: no selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="THE REPORT IS NOT CHECKED IN A BROWSER: chromium and chromedriver are not on the path "
    "(Debian: apt-get install chromium chromium-driver)",
)
SECTIONS = ["Student", "Results", "Training", "The same prompts after each stage", "Chat with rlhf", "Lineage",
            "Resolved config", "Next"]  # fmt: skip
FIRST_LINES = """
  return [...document.querySelectorAll("table")].map(table => [...table.rows].map(row =>
    [...row.cells].map(cell => cell.innerText.split("\\n").map(line => line.trim()))))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def look(browser, page, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # a window has a least width, a page has not
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_shows_every_section(browser, three_phases, width, scheme):
    look(browser, write_report(three_phases()), width, scheme)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    headings = browser.find_elements("css selector", "h2")
    assert [h.text for h in headings if h.is_displayed()] == SECTIONS
    drawn = browser.execute_script("return [...document.querySelectorAll('figure svg')].map(s => s.clientHeight)")
    assert len(drawn) == 7 and min(drawn) > 150
    assert contrast(browser) >= 4.5
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    # the browser's own first page is among them
    assert [url for url in asked if not url.startswith(("file:", "data:", "chrome:", "about:"))] == []


def contrast(browser) -> float:
    """The least contrast of muted, gained and cost text with the page and with a card (WCAG 2.2 asks for 4.5)."""
    return browser.execute_script("""
      const probe = document.body.appendChild(document.createElement("i")), styles = getComputedStyle(probe)
      const light = name => {
        probe.style.color = `var(${name})`
        const parts = styles.color.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        const linear = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05
      }
      const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b))
      const found = ["--fg", "--muted", "--good", "--bad"].flatMap(a => ["--bg", "--card"].map(b => ratio(a, b)))
      probe.remove()
      return Math.min(...found)
    """)


@pytest.mark.parametrize("width", [390, 1280])
def test_figures_in_the_page_are_those_of_the_manifests(browser, three_phases, width):
    """Read back from the DOM and from disk, with a format of our own in between."""
    run = three_phases()
    look(browser, write_report(run), width)
    results, _by_task, _, training = browser.execute_script(FIRST_LINES)
    stages = [stage for stage in json.loads((run / "MANIFEST.json").read_text())["stages"] if stage.get("of")]
    shown = {row[0][0]: [cell[:2] for cell in row[1:]] for row in results[1:]}
    names = [s["of"] for s in stages if s["phase"] == "evaluate"]
    assert list(shown) == names and len(names) == 7
    for name in names:
        found = json.loads((run / f"evaluate_{name}" / "MANIFEST.json").read_text())["results"]
        cells = []
        for measure in ("bits_per_byte", "accuracy", "preference", "reward", "kl_to_teacher"):
            scale, form, sign = (100, "%.1f", "%") if measure in ("accuracy", "preference") else (1, "%.3f", "")
            entry = {k: form % (scale * v) for k, v in found[measure].items()} if measure in found else None
            cells.append([entry["value"] + sign, f"{entry['low']}–{entry['high']}"] if entry else ["–"])
        assert shown[name] == cells
    for row in training[1:]:
        name, parameters, steps, *_, memory, train, _val = [cell[0] for cell in row]
        facts = json.loads((run / name / "MANIFEST.json").read_text())
        last = json.loads((run / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert parameters == f"{facts['model']['parameters'] / 1e6:.2f}M" and steps == str(facts["steps"])
        assert memory == "1.2 GB" and train == ("–" if name == "rlhf" else f"{last['train/loss']:.3f}")
    assert len(training) == 8
