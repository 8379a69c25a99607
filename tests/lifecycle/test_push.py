"""push=: to a hub that is played here, over real HTTP; refused without a token, before any work."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """The few of the hub's endpoints that an upload meets. Every file travels inside the commit ("regular")."""

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.seen.append(self.path)
        name = "/".join(self.path.split("/")[3:5]).partition("?")[0]
        self.answer({"id": name, "private": self.server.private, "siblings": [], "tags": [], "sha": "0" * 40})

    do_HEAD = do_GET

    def do_POST(self):
        self.server.seen.append(self.path)
        self.server.tokens.add(self.headers.get("Authorization"))
        size = self.headers.get("Content-Length")
        body = self.rfile.read(int(size)) if size else b"".join(self.chunks())
        if self.server.broken:
            return self.answer({"error": "the hub is closed today"}, 403)
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return self.answer({"url": f"{self.server.url}/me/mine"})
        if "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(body)["files"]]
            plain = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer({"files": plain})
        if self.path == "/api/validate-yaml":  # the head of a model card
            return self.answer({"errors": [], "warnings": []})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.url}/me/mine/commit/{'a' * 40}", "commitOid": "a" * 40,
                            "success": True, "hookOutput": ""})  # fmt: skip

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.tokens, server.files, server.made = [], set(), {}, None
    server.private, server.broken = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pushed(launch, trained, hub, tmp_path):
    """pushed(*overrides, token=...) -> the finished command, and the folder that it wrote."""

    def pushed(*more, token="hf_secret"):
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token, "NO_PROXY": "*"}
        done = launch("phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out", *more, **home)
        return done, tmp_path / "out/hf"

    return pushed


def test_a_confirmed_export_is_pushed_private(pushed, hub):
    done, folder = pushed()
    assert done.returncode == 0, done.stderr
    (folder / "notes.txt").write_text("mine alone")
    (folder / ".env").write_text("KEY=secret")
    (folder / "README.md").write_text("# A model card")
    done, _ = pushed("push=me/mine")
    assert done.returncode == 0, done.stderr
    assert "pushed to http://127.0.0.1" in done.stdout.replace("\n", "")
    assert hub.made["name"] == "mine" and hub.made["organization"] == "me"
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert hub.files == {name: (folder / name).read_bytes() for name in (*names, "VERIFIED.json", "README.md")}
    assert json.loads(hub.files["VERIFIED.json"])["files"].keys() == names
    assert hub.tokens == {"Bearer hf_secret"}
    written = [p.read_text() for p in folder.parent.iterdir() if p.suffix in (".json", ".yaml", ".txt", ".html")]
    assert len(written) > 2 and not any("hf_secret" in text for text in written)


def test_a_public_repository_is_not_written_to_unasked(pushed, hub):
    hub.private = False
    done, _ = pushed("push=me/mine")
    assert done.returncode == 2 and "push=me/mine is public already" in done.stderr
    assert hub.files == {}


def test_nothing_is_pushed_that_the_gate_refuses(trained, hub, main, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("trivium.phases.export.TOLERANCE", -1.0)
    monkeypatch.setattr("trivium.phases.export.push", lambda *_, **__: pytest.fail("pushed"))
    done = main("phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out", "push=me/mine")
    assert done.code == 1 and "logits of transformers differ" in done.err


def test_what_the_hub_says_is_told_and_the_export_stays(pushed, hub):
    hub.broken = True
    done, folder = pushed("push=me/mine")
    assert done.returncode == 1 and "is good and was not pushed to me/mine" in done.stderr
    assert "Traceback" not in done.stderr and (folder / "VERIFIED.json").exists()


def test_without_a_token_nothing_begins(pushed, hub):
    done, folder = pushed("push=me/mine", token="")
    assert done.returncode == 2 and "push=me/mine needs a token" in done.stderr
    assert hub.seen == [] and not folder.exists()


def test_settings(main, trained, tmp_path):
    start = ("phase=export", f"init_from={trained}", f"runs={tmp_path}", "name=out")
    for more, sentence in (
        (("push=mine",), "push='mine' names no repository of the hub; write push=owner/name"),
        (("push_public=true",), "push_public=true is for push=owner/name"),
        (("phase=generate", "push=a/b"), "push=a/b is for phase=export, not for phase=generate"),
    ):
        done = main(*(start[1:] if more[0].startswith("phase") else start), *more)
        assert done.code == 2 and sentence in done.err, done.err
