"""The hub as a source, through `datasets` itself, on local folders in the hub's layout and with its sets' columns."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import trivium.data.hub as hub
from trivium.compose import compose, options, run_config
from trivium.data.config import HubConfig
from trivium.data.hub import Hub
from trivium.data.source import form_of
from trivium.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def layout(folder, splits, subset="default", **how):
    """A data set as the hub has one: Parquet files, and a card that says which splits they are."""
    (folder / subset).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / subset / f"{split}-00000-of-00001.parquet", **how)
    files = [{"split": s, "path": f"{subset}/{s}-*"} for s in splits]
    card = yaml.safe_dump({"configs": [{"config_name": subset, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return str(folder)


def sums(count, start=0):
    return [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(start, start + count)]


@pytest.fixture
def settings(tmp_path):
    dataset = layout(tmp_path / "sums", {"train": sums(2500), "test": sums(5, 9000)}, "main", row_group_size=300)
    return {"dataset": dataset, "subset": "main", "schema": "answers", "checker": "number"}


def test_a_split_and_its_own_held_out_one(settings):
    train = Hub(HubConfig(**settings, validation_split="test"))
    held = Hub(HubConfig(**settings, validation_split="test", split="validation"))
    assert (len(train), len(held)) == (2500, 5)
    place = settings["dataset"]
    turns = [{"role": "user", "content": "3 + 1?"}, {"role": "assistant", "content": "so #### 4"}]
    assert train[3] == {"id": f"{place}/train:4", "messages": turns, "answer": "so #### 4", "task": "sums"}
    assert held[0]["messages"][0]["content"] == "9000 + 1?"
    assert train.score(train[3], "4").correct and train.notes["rows"] == 2500


def test_a_share_is_held_out_where_there_is_no_split_for_it(settings):
    sides = [Hub(HubConfig(**settings, validation_share=0.2, split=s)) for s in ("train", "validation")]
    ids = [{side[i]["id"] for i in range(len(side))} for side in sides]
    assert ids[0].isdisjoint(ids[1]) and sum(map(len, ids)) == 2500
    assert 400 <= len(ids[1]) <= 600  # 500 expected, five standard deviations are 100


def test_streaming_reads_the_first_rows_alone_and_the_same(settings, monkeypatch, cache):
    monkeypatch.setattr(hub, "SHARD", 1000)
    whole = Hub(HubConfig(**settings, validation_share=0.0, max_rows=2300))
    streamed = Hub(HubConfig(**settings, validation_share=0.0, max_rows=2300, streaming=True))
    assert len(whole) == len(streamed) == 2300 and streamed.fingerprint == whole.fingerprint
    assert [streamed[i] for i in range(2300)] == [whole[i] for i in range(2300)]
    (folder,) = (cache / "hub").iterdir()
    assert [p.name for p in sorted(folder.glob("*.arrow"))] == ["00000.arrow", "00001.arrow", "00002.arrow"]
    monkeypatch.setattr(hub.datasets, "load_dataset", None)  # what is there is not read again
    assert len(Hub(HubConfig(**settings, validation_share=0.0, max_rows=2300, streaming=True))) == 2300


def test_a_stopped_fetch_goes_on_behind_the_last_whole_shard(settings, monkeypatch, cache):
    """Stopped while the second shard's state is written: the third start reads 1,300 of 2,300 rows."""
    monkeypatch.setattr(hub, "SHARD", 1000)
    wanted = HubConfig(**settings, validation_share=0.0, max_rows=2300, streaming=True)
    real, written = hub.replace_file, []

    def stop(path, data):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(hub, "replace_file", stop)
    with pytest.raises(KeyboardInterrupt):
        Hub(wanted)
    assert written == ["00000.arrow", "00000.json", "00001.arrow"]
    monkeypatch.setattr(hub, "replace_file", lambda path, data: (written.append(path.name), real(path, data)))
    source = Hub(wanted)
    assert written[3:] == ["00001.arrow", "00001.json", "00002.arrow", "00002.json", "DONE"]
    assert [source[i]["messages"][0]["content"] for i in range(2300)] == [f"{i} + 1?" for i in range(2300)]


def test_a_changed_folder_is_streamed_anew(settings):
    wanted = {**settings, "validation_share": 0.0, "max_rows": 10, "streaming": True}
    before = Hub(HubConfig(**wanted))
    layout(Path(settings["dataset"]), {"train": sums(50, 100)}, "main")
    after = Hub(HubConfig(**wanted))
    assert (before[0]["answer"], after[0]["answer"]) == ("so #### 1", "so #### 101")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hub_split": "trian"}, 'Unknown split "trian"'),
        ({"subset": "mian"}, "'mian' not found. Available: .'main'."),
        ({"schema": "pairs"}, r"has the columns question, answer; known are pairs: chosen, rejected"),
        ({"dataset": ""}, "domain=hub needs data.dataset=OWNER/NAME or a folder, or one of the known"),
        ({"forms": ["chat"]}, r"holds answers .*; data.forms=\[chat\] reads .* or choose phase=rlhf"),
    ],
)
def test_wrong_settings_are_told(changes, says, settings):
    with pytest.raises(DataError, match=says) as error:
        Hub(HubConfig(**{**settings, **changes}))
    assert "\n" not in str(error.value)


def test_streaming_needs_an_end():
    with pytest.raises(ConfigError, match="data.streaming=true needs how many rows to read"):
        HubConfig(streaming=True)
    with pytest.raises(ConfigError, match="data.max_rows=-1 must not be negative"):
        HubConfig(max_rows=-1)


def test_without_a_network_one_sentence_says_what_to_do(tmp_path):
    """Whole and streamed, in a process that has the hub's own switch for having no network from its start."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRIVIUM_CACHE": str(tmp_path)}
    words = ["phase=sft", "dataset=gsm8k", "model=primer", f"runs={tmp_path}"]
    program = f"from trivium.cli import main; main({words}); main({[*words, 'data.streaming=true', 'data.max_rows=9']})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stderr.splitlines()
    assert len(said) == 2, done.stderr
    for line in said:
        assert line.startswith(
            "error: data.dataset=openai/gsm8k (split train) cannot be had from the Hugging Face hub ("
        )
        assert line.endswith("or fetch it elsewhere and set data.dataset to that folder") and len(line) < 500


FIRST, SECOND = "a" * 40, "b" * 40
COMMITS = {FIRST: ["one heron", "two herons"], SECOND: ["three herons", "four herons", "five herons"]}
NAMES = {"main": SECOND, "old": FIRST}


class Played(BaseHTTPRequestHandler):
    """The few of the hub's endpoints that reading a data set meets: one file, of which each commit has other rows."""

    def answer(self, data=b"", code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        asked = self.rfile.read(size).decode()
        place = self.path.partition("?")[0].strip("/")
        kind, _, rest = place.removeprefix("api/").removeprefix("datasets/me/mine").strip("/").partition("/")
        name = rest.split("/")[0] or "main"
        commit = NAMES.get(name, name)
        if self.server.closed:
            return self.answer(code=403)
        if "datasets/me/mine" not in place:
            return self.answer(code=404, X_Error_Code="EntryNotFound")
        if commit not in COMMITS:
            return self.answer(code=404, X_Error_Code="RevisionNotFound")
        data = "".join(json.dumps({"text": text}) + "\n" for text in COMMITS[commit]).encode()
        mark = hashlib.sha1(data).hexdigest()
        entry = {"type": "file", "path": "train.jsonl", "size": len(data), "oid": mark}
        if not place.startswith("api/"):
            if not rest.endswith("/train.jsonl"):
                return self.answer(code=404, X_Error_Code="EntryNotFound")
            return self.answer(data, ETag=f'"{mark}"', X_Repo_Commit=commit)
        if kind in ("tree", "paths-info"):
            wanted = kind == "tree" or "train.jsonl" in asked
            return self.answer(json.dumps([entry] * wanted).encode())
        facts = {"id": "me/mine", "sha": commit, "siblings": [{"rfilename": "train.jsonl"}], "tags": []}
        return self.answer(json.dumps({**facts, "private": False}).encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def played():
    """A hub that is played here, over real HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Played)
    server.closed = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


READ = """
import json, sys
from trivium.cli import main
from trivium.data.config import HubConfig
from trivium.data.hub import Hub
from trivium.errors import DataError
for line in sys.stdin:
    said = json.loads(line)
    if isinstance(said, list):
        answer = main(said)
    else:
        try:
            source = Hub(HubConfig(dataset="me/mine", validation_share=0.0, **said))
            answer = [source.notes["commit"], [source[i]["text"] for i in range(len(source))]]
        except DataError as error:
            answer = str(error)
    print("=", json.dumps(answer), flush=True)
"""


def test_the_revision_that_is_asked_for_is_read_and_kept(played, tmp_path):
    """A branch's commit, or a commit itself, whole and streamed, is what the rows are of and what the manifest names.
    When the hub is away, `datasets` gives whatever it fetched last: that is no other commit than was asked for."""
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{played.server_port}", "HF_HOME": str(tmp_path / "home"),
           "HF_TOKEN": "hf_secret", "NO_PROXY": "*", "TRIVIUM_CACHE": str(tmp_path / "cache")}  # fmt: skip
    reader = subprocess.Popen(
        [sys.executable, "-c", READ], cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def read(said):
        reader.stdin.write(json.dumps(said) + "\n")
        reader.stdin.flush()
        return json.loads(next(line for line in reader.stdout if line.startswith("= "))[2:])

    with reader:
        first, second = [FIRST, COMMITS[FIRST]], [SECOND, COMMITS[SECOND]]
        for how in ({}, {"streaming": True, "max_rows": 9}):
            assert read({"revision": "old", **how}) == first
            assert read({"revision": FIRST, **how}) == first
            assert read({"revision": "main", **how}) == second
            assert read(how) == second
            assert "'new'" in (said := read({"revision": "new", **how})) or "404" in said
        command = ["phase=tokenizer", "domain=hub", "data.dataset=me/mine", "data.revision=old",
                   "data.validation_share=0", "tokenizer.vocab_size=300", f"runs={tmp_path}", "name=kept"]  # fmt: skip
        assert read(command) == 0
        kept = json.loads((tmp_path / "kept/MANIFEST.json").read_text())["read"]
        assert kept == {"train": {"rows": 2, "dataset": "me/mine", "commit": FIRST}}
        played.closed = True
        found = [read({"revision": commit}) for commit in (FIRST, SECOND)]
        assert found[1] == second and found[0].startswith(
            f"data.dataset=me/mine (split train) cannot be had from the Hugging Face hub (not commit {FIRST}, only "
        ), found
        reader.stdin.close()


def test_a_folder_has_no_commit(settings):
    """It is not said to be of one; asking for one is refused, and the name of a branch is of the hub it came from."""
    with pytest.raises(DataError, match="is a folder, which has no commits; leave data.revision away"):
        Hub(HubConfig(**settings, revision=FIRST))
    source = Hub(HubConfig(**settings, revision="refs/convert/parquet"))
    assert source.notes["commit"] == "" and len(source) > 2000


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
OTHER = [TURNS[0], {"role": "assistant", "content": "c"}]
SETS = {
    "fineweb_edu": ("text", {"text": "a", "id": "x", "dump": "CC", "url": "u", "language": "en", "score": 3.1}),
    "tinystories": ("text", {"text": "a"}),
    "wikipedia_en": ("text", {"id": "1", "url": "u", "title": "t", "text": "a"}),
    "pile_of_law": ("text", {"text": "a", "created_timestamp": "c", "downloaded_timestamp": "d", "url": "u"}),
    "ultrachat_200k": ("chat", {"prompt": "a", "prompt_id": "x", "messages": TURNS}),
    "tulu_3_sft": ("chat", {"id": "x", "messages": TURNS, "source": "s"}),
    "no_robots": ("chat", {"prompt": "a", "prompt_id": "x", "messages": TURNS, "category": "Coding"}),
    "dolly_15k": ("chat", {"instruction": "a", "context": "", "response": "b", "category": "open_qa"}),
    "magicoder_oss": (
        "chat",
        {"lang": "python", "raw_index": 1, "index": 2, "seed": "s", "problem": "a", "solution": "b"},
    ),
    "magicoder_evol": ("chat", {"instruction": "a", "response": "b"}),
    "orca_math": ("chat", {"question": "a", "answer": "b"}),
    "hermes_function_calling": (
        "chat",
        {"id": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    ),
    "ultrafeedback": (
        "pairs",
        {"prompt": "a", "prompt_id": "x", "chosen": TURNS, "rejected": OTHER, "messages": TURNS, "score_chosen": 9.0},
    ),
    "hh_rlhf": (
        "pairs",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    ),
    "kto_mix_14k": ("labels", {"prompt": TURNS[:1], "completion": TURNS[1:], "label": True}),
    "prm800k": ("steps", {"prompt": "a", "completions": ["b"], "labels": [True]}),
    "gsm8k": ("answers", {"question": "a", "answer": "so\n#### 5"}),
    "medmcqa": (
        "answers",
        {"id": "x", "question": "a", "opa": "b", "opb": "c", "opc": "d", "opd": "e", "cop": 1, "choice_type": "single",
         "exp": None, "subject_name": "Eye", "topic_name": None},
    ),
    "mmlu": ("answers", {"question": "a", "subject": "law", "choices": ["b", "c", "d", "e"], "answer": 1}),
    "arc_challenge": (
        "answers",
        {"id": "x", "question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"},
    ),
}  # fmt: skip
"""The columns of each known set and one row, and the form that it has."""
PHASE = {"text": "pretrain", "chat": "sft", "pairs": "preference", "labels": "preference", "answers": "rlhf"}


def test_every_known_set_is_tested():
    assert set(options("dataset")) == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_known_set_is_read_from_a_folder_of_its_columns(name, tmp_path):
    """The settings of the file, but for the place; the phase that the form is for takes it, and evaluate reads the
    held-out side."""
    form, row = SETS[name]
    phase = PHASE.get(form, "evaluate")
    config = run_config(compose([f"phase={phase}", f"dataset={name}"])).data.config
    splits = {config.hub_split: [row, row]}
    if config.validation_split:
        splits[config.validation_split] = [row]
    dataset = layout(tmp_path / name, splits, config.subset or "default")
    place = [f"phase={phase}", f"dataset={name}", f"data.dataset={dataset}", "data.validation_share=0"]
    if config.streaming:
        place.append("data.max_rows=2")
    if phase == "evaluate":
        place.append("data.split=train")
    source = Hub(run_config(compose(place)).data.config)
    assert len(source) == 2 and form_of(source[0]) == form
    if "messages" in source[0] and form == "chat":
        assert source[0]["messages"] == TURNS
    if form == "pairs":
        assert (source[0]["chosen"], source[0]["rejected"]) == (TURNS, OTHER)
    if form == "answers":
        assert source.score(source[0], source[0]["answer"]).correct and not source.score(source[0], "7").correct
    held = run_config(compose(["phase=evaluate", f"dataset={name}", *place[2:]])).data.config
    assert held.split == ("train" if phase == "evaluate" else "validation")
    if config.validation_split and phase != "evaluate":
        assert len(Hub(held)) == 1


def test_a_known_set_is_tuned_on_by_its_name(main, tmp_path):
    """Through the command line, steps and all; the manifest says which data set it was."""
    said = [{"messages": [{"role": "user", "content": f"What is {i}?"}, TURNS[1]], "prompt": "x"} for i in range(64)]
    dataset = layout(tmp_path / "chat", {"train_sft": said[4:], "test_sft": said[:4]})
    tiny = [f"model.{k}={v}" for k, v in {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn_dim": 24}.items()]
    done = main("phase=sft", "dataset=ultrachat_200k", f"data.dataset={dataset}", "model=primer", *tiny,
                "tokenizer.vocab_size=320", "batch.size=4", "batch.micro_size=4", "batch.length=64",
                "trainer.max_steps=2", "validation.every_steps=2", "samples.every_steps=0", f"runs={tmp_path}",
                "name=run")  # fmt: skip
    assert done.code == 0, done.err
    read = json.loads((tmp_path / "run/MANIFEST.json").read_text())["read"]
    assert read["train"] == {"rows": 60, "dataset": dataset, "commit": ""} and read["validation"]["rows"] == 4
