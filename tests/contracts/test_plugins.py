"""Plugins as strangers write them: a built and installed distribution, broken ones, and ones that clash."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from trivium.data.config import SourceConfig

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "bedside-trivium"
version = "1.2.3"

[project.entry-points."trivium.plugins"]
bedside = "bedside:plugin"
"""
INIT = """\
from trivium import Entry, Plugin

plugin = Plugin(
    name="bedside",
    conf="pkg://bedside.conf",
    sources={"ward": Entry("bedside.source:Ward", "bedside.config:WardConfig", help="questions at the bedside")},
    help="talks between doctors and patients",
)
"""
CONFIG = """\
from dataclasses import dataclass

from trivium import SourceConfig


@dataclass(frozen=True)
class WardConfig(SourceConfig):
    beds: int = 40  # more beds, more questions
"""
SOURCE = """\
import torch  # a component may be heavy: it is imported when it is chosen

from trivium import Source


class Ward(Source):
    phases = frozenset({"sft"})

    def __len__(self):
        return self.config.beds

    def __getitem__(self, i):
        turns = [("user", f"How is bed {i}?"), ("assistant", f"Bed {i} sleeps well, temperature {36 + i % 4}.")]
        return {"id": str(i), "messages": [{"role": r, "content": c} for r, c in turns]}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A real wheel: built by hatchling, installed by pip into a folder of its own."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    files = {
        "pyproject.toml": PYPROJECT,
        "bedside/__init__.py": INIT,
        "bedside/config.py": CONFIG,
        "bedside/source.py": SOURCE,
        "bedside/conf/__init__.py": "",
        "bedside/conf/domain/med.yaml": "# @package _global_\n# bedside talk\ndomain: med\n",
        "bedside/conf/data/med/sft.yaml": "# @package data\ndefaults: ['/data/ward@_here_']\nbeds: 25\n",
    }
    for path, text in files.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(text)
    # without hatchling told, the wheel's name (bedside_trivium) would be looked for as a package
    (project / "pyproject.toml").write_text(PYPROJECT + '\n[tool.hatch.build.targets.wheel]\npackages = ["bedside"]\n')
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", site, project], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (site / "bedside_trivium-1.2.3.dist-info").is_dir() and (site / "bedside/conf/domain/med.yaml").is_file()
    return site


def listed(launch, *sites):
    done = launch("plugins", "list", path=sites)
    rows = [line.split() for line in done.stdout.splitlines()]
    return done, rows


def test_installed_domain_and_source_are_offered(installed, launch):
    shown = launch("--help", path=[installed])
    groups = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert shown.returncode == 0 and not shown.stderr
    assert {"files", "med", "primer"} <= {name.rstrip(",") for name in groups["domain"]}
    assert {"files", "primer", "ward"} <= {name.rstrip(",") for name in groups["data"]}
    assert " med," not in launch("--help").stdout, "without the plugin there is no such domain"


def test_installed_plugin_is_listed_with_its_version(installed, launch):
    done, rows = listed(launch, installed)
    assert done.returncode == 0, done.stderr
    assert "bedside bedside-trivium 1.2.3 talks between doctors and patients".split() in rows
    assert "sources ward bedside questions at the bedside".split() in rows
    assert f"bedside ({installed}/bedside/conf)" in done.stdout


@pytest.mark.parametrize("command", ["--help", "plugins list", "explain data.beds phase=sft domain=med"])
def test_component_module_is_not_imported_by_listing(installed, command):
    script = f"import sys; from trivium.cli import main; code = main({command.split()!r}); "
    script += "print(code, sorted(m for m in sys.modules if m.startswith('bedside')), 'torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    code, modules = told.stdout.splitlines()[-1].split(" ", 1)
    assert code == "0", told.stderr
    assert "bedside.source" not in modules and modules.endswith("False")
    if command.startswith("explain"):
        assert "data.beds = 25" in told.stdout and "default  40" in told.stdout
        assert "more beds, more questions" in told.stdout and "data/med/sft.yaml" in told.stdout


def test_phase_runs_on_an_installed_domain(installed, launch, tuning, tmp_path):
    """Three steps of tuning on the 25 talks that the plugin's YAML asks for."""
    overrides = [o for o in tuning(tmp_path, "a", "trainer.max_steps=3") if not o.startswith("data.")]
    done = launch(*overrides, "domain=med", path=[installed])
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "a/MANIFEST.json").read_text())
    assert (facts["domain"], facts["status"], facts["steps"]) == ("med", "done", 3)
    every_source = {key for key in asdict(SourceConfig()) if key not in ("split", "seed")}
    own = {key: value for key, value in facts["config"]["data"].items() if key not in every_source}
    assert own == {"name": "ward", "split": "train", "seed": 0, "beds": 25}


def test_phase_that_the_domain_lacks_lists_what_it_has(installed, launch):
    """The list comes from the file names, so nothing of the plugin is imported."""
    told = launch("phase=evaluate", "domain=med", path=[installed])
    assert (told.returncode, told.stderr) == (2, "error: domain=med has no data for phase=evaluate; it has sft\n")


HEALTHY = {"__init__.py": "from trivium import Plugin\nplugin = Plugin(name='healthy', help='fine')\n"}


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("plugin = 7\n", "'sick:plugin' is a int, not a trivium.Plugin"),
        ("", "module 'sick' has no attribute 'plugin'"),
        ("def\n", "SyntaxError"),
        ("raise SystemExit(5)\n", "SystemExit"),
        ("from trivium import Plugin\nplugin = Plugin(name='sick', api=99)\n", "is written for API level 99"),
    ],
)
def test_broken_plugin_is_reported_and_harms_nobody(init, reason, launch, plugin_folder):
    sites = [plugin_folder("sick", {"__init__.py": init}), plugin_folder("healthy", HEALTHY)]
    done, rows = listed(launch, *sites)
    assert done.returncode == 1
    assert done.stderr.startswith("FAILED sick: ") and reason in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert ["healthy", "healthy", "1.0", "fine"] in rows
    assert any(row[:1] == ["primer"] for row in rows)


def test_broken_plugin_does_not_stop_others(launch, plugin_folder):
    site = plugin_folder("sick", {"__init__.py": "1 / 0\n"})
    shown = launch("--help", path=[site])
    assert shown.returncode == 0 and "primer" in shown.stdout
    composed = launch("--cfg", "job", "phase=sft", "domain=primer", path=[site])
    assert composed.returncode == 0 and "name: primer" in composed.stdout, composed.stderr


def test_names_of_a_refused_plugin_are_not_left_behind(launch, plugin_folder):
    """API level 99, with a model: neither listed nor a choice."""
    init = "from trivium import Plugin\nplugin = Plugin(name='sick', api=99, models={'gpt9': 'sick:X'})\n"
    done, _ = listed(launch, plugin_folder("sick", {"__init__.py": init}))
    assert "gpt9" not in done.stdout


def named(name, kind, extra=""):
    return {"__init__.py": f"from trivium import Plugin\nplugin = Plugin(name='{name}', {kind}{extra})\n"}


def test_two_plugins_may_not_have_the_same_name(launch, plugin_folder):
    """Two distributions announce the entry point `twin`: the clash is named, not settled by chance."""
    first = plugin_folder("twin", named("twin", "help='the first'"), folder="one")
    second = plugin_folder("other", named("twin", "help='the second'"), folder="two")
    (second / "other-1.0.dist-info/entry_points.txt").write_text("[trivium.plugins]\ntwin = other:plugin\n")
    done, _ = listed(launch, first, second)
    assert done.returncode == 1
    assert "FAILED twin:" in done.stderr and "twin 1.0" in done.stderr and "other 1.0" in done.stderr


def test_component_of_two_plugins_is_chosen_by_its_qualified_name(launch, plugin_folder):
    """`models={'llama': ...}` of another package does not shadow ours: the short name says so and names both."""
    site = plugin_folder("rival", named("rival", "models={'llama': 'trivium.models.llama:Llama'}"))
    told = launch("explain", "model.dim", "model=llama", path=[site])
    assert told.returncode == 2
    assert "the model 'llama' comes from 2 packages; write trivium:llama or rival:llama" in told.stderr


def test_config_file_of_two_plugins_is_a_clash(launch, plugin_folder):
    """Both bring conf/domain/shared.yaml; which one counts must not depend on the order of the search path."""
    conf = {"conf/__init__.py": "", "conf/domain/shared.yaml": "# @package _global_\ndomain: shared\n"}
    sites = [
        plugin_folder(name, {**named(name, f"conf='pkg://{name}.conf'"), **conf}, folder=name) for name in ("aa", "bb")
    ]
    done, _ = listed(launch, *sites)
    assert done.returncode == 1
    assert "domain/shared.yaml" in done.stderr and "aa" in done.stderr and "bb" in done.stderr


def test_config_file_of_core_cannot_be_replaced(launch, plugin_folder):
    """A plugin with a conf/phase/sft.yaml of its own is refused by the file's name; core's stays."""
    conf = {"conf/__init__.py": "", "conf/phase/sft.yaml": "# @package _global_\nphase: sft\nseed: 7\n"}
    site = plugin_folder("sly", {**named("sly", "conf='pkg://sly.conf'"), **conf})
    done, _ = listed(launch, site)
    assert done.returncode == 1 and "FAILED sly: its config file phase/sft.yaml is trivium's already" in done.stderr
    assert "seed: 0" in launch("--cfg", "job", "phase=sft", path=[site]).stdout


def test_conf_that_is_no_package_is_reported(launch, plugin_folder):
    done, _ = listed(launch, plugin_folder("bare", named("bare", "conf='pkg://bare.conf'")))
    assert done.returncode == 1 and "FAILED bare: conf='pkg://bare.conf' names no package" in done.stderr
