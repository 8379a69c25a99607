"""The wheel works without the checkout: configs, plugins and launchers are inside, and nothing else is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    command = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(place),
        str(ROOT),
    ]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return next(place.glob("*.whl"))


def test_wheel_holds_three_packages_and_no_checkout_folders(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/")[0] for n in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"trivium", "trivium_plugins", "hydra_plugins"}
    for wanted in ("trivium/conf/config.yaml", "trivium/py.typed", "trivium_plugins/primer/data/books.txt.xz",
                   "trivium_plugins/primer/conf/recipe/primer/sft.yaml", "trivium/lineage/report.html.j2",
                   *(f"trivium/inference/page/{name}" for name in
                     ("index.html", "app.js", "api.js", "markdown.js", "style.css"))):  # fmt: skip
        assert wanted in names


def test_installed_wheel_lists_composes_and_runs_from_anywhere(wheel, tmp_path):
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    env = dict(os.environ, PYTHONPATH=str(site), TRIVIUM_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")

    def trivium(*args):
        code = "import sys, trivium; assert 'site' in trivium.__file__; from trivium.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", code, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    listed = trivium("plugins", "list")
    assert listed.returncode == 0, listed.stderr
    assert "primer" in listed.stdout and str(site) in listed.stdout
    explained = trivium("explain", "trainer.max_steps", "phase=pretrain")
    assert (
        f"{site}/trivium_plugins/primer/conf" in explained.stdout or "recipe/primer/pretrain.yaml" in explained.stdout
    )
    made = trivium("phase=tokenizer", "tokenizer.vocab_size=400", "tokenizer.max_bytes=100000")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "runs/tokenizer-primer/tokenizer.json").is_file()
