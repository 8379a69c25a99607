"""What may import what (house rules), and that asking for help costs next to nothing."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import trivium

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "trivium"
FILES = sorted(CORE.rglob("*.py"))
SANDBOX = ["cli.py", "compose.py", "explain.py", "plugin.py", "sweep/"]


def imports(path, *, nested):
    """(line, module) of every import of a file; nested: only those inside functions."""
    tree = ast.parse(path.read_text())
    inside = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)]
    for node in inside if nested else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module or ""


def offenders(packages, allowed, *, nested=False):
    """Core's files outside `allowed` (files, or folders ending in /) that import one of `packages`."""
    return [
        f"{name}:{line} imports {module}"
        for path in FILES
        if not (name := path.relative_to(CORE).as_posix()).startswith(tuple(allowed))
        for line, module in imports(path, nested=nested)
        if module.partition(".")[0] in packages
    ]


def test_import_linter_keeps_all_contracts():
    tool = Path(sys.executable).parent / "lint-imports"
    checked = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert "0 broken" in checked.stdout and "kept" in checked.stdout


def test_core_never_imports_a_plugin():
    assert offenders({"trivium_plugins"}, []) == []
    assert not [p for p in FILES if "trivium_plugins" in p.read_text()], "core names no plugin, not even in a string"


def test_lightning_is_the_loop_only():
    assert offenders({"lightning", "pytorch_lightning"}, ["training/", "data/datamodule.py"]) == []


def test_hydra_stays_at_the_entry():
    assert offenders({"hydra", "omegaconf"}, SANDBOX) == []


def test_transformers_stays_in_its_adapters_and_the_export_gate():
    assert offenders({"transformers"}, ["models/hf.py", "inference/hf.py", "phases/export.py"]) == []


def test_encoders_and_their_index_stay_in_their_adapters():
    assert offenders({"sentence_transformers"}, ["inference/encoder.py"]) == []
    assert offenders({"faiss"}, ["inference/index.py"]) == []


def test_no_module_of_ours_is_imported_inside_a_function():
    """A function-level import hides a cycle or a cost; registry.load is the one place that imports by name."""
    assert offenders({"trivium"}, [], nested=True) == []


def test_import_rules_can_fail(tmp_path, monkeypatch):
    """The walker above sees plain, from-, dotted and nested imports."""
    bad = tmp_path / "bad.py"
    plain = "import lightning.pytorch as L\nfrom hydra.core import x\n"
    bad.write_text(plain + "def f():\n    from trivium.cli import main\n")
    monkeypatch.setitem(globals(), "CORE", tmp_path)
    monkeypatch.setitem(globals(), "FILES", [bad])
    assert offenders({"lightning", "hydra"}, ["other.py"]) == [
        "bad.py:1 imports lightning.pytorch",
        "bad.py:2 imports hydra.core",
    ]
    assert offenders({"trivium"}, [], nested=True) == ["bad.py:4 imports trivium.cli"]
    assert offenders({"lightning", "hydra"}, ["bad.py"]) == []


def test_other_init_files_are_empty():
    """Only the two public faces say something; every other package is a folder."""
    faces = {CORE / "__init__.py", CORE / "testing" / "__init__.py"}
    assert [p for p in FILES if p.name == "__init__.py" and p not in faces and p.read_text().strip()] == []


@pytest.mark.parametrize("name", trivium.__all__)
def test_public_name_resolves(name):
    assert getattr(trivium, name) is not None
    assert name in dir(trivium)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        _ = trivium.Modell


HEAVY = "torch lightning datasets tokenizers transformers wandb matplotlib pandas numpy".split()


@pytest.mark.parametrize("command", [["--help"], ["plugins", "list"], ["explain", "optim.lr"]], ids=" ".join)
def test_listing_verbs_import_nothing_heavy(command):
    """In a fresh interpreter, through the same entry that launch.py calls."""
    script = f"import sys; from trivium.cli import main; code = main({command!r}); "
    script += f"print('IMPORTED', sorted(set({HEAVY!r}) & set(sys.modules)), code)"
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.splitlines()[-1] == "IMPORTED [] 0", told.stdout[-300:] + told.stderr


def test_help_takes_less_than_a_second_of_processor_time():
    """User and system time of the child; the smallest of three, since other processes share the machine."""
    seconds = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "launch.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0 and isinstance(usage, resource.struct_rusage)
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 1.0, seconds
