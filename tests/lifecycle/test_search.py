"""`phase=search` as it is started: an index that follows the files, passages with places, answers with sources."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.inference.encoders import minilm, tiny_encoder

from trivium.data.passages import Passage
from trivium.phases.search import Source, asked, cited

pytest.importorskip("faiss", reason="NOT TESTED: phase=search needs faiss")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    place.mkdir()
    (place / "birds.md").write_text("# Birds\n\nthe heron waits in the river\n\n" + "a fish swims by\n" * 30)
    (place / "law.txt").write_text("contracts need two parties and an offer\n")
    (place / "rows.jsonl").write_text('{"text": "the river"}\n{"text": "an offer swims"}\n')
    return place


@pytest.fixture
def search(main, encoder, folder, tmp_path):
    def search(*changes, encoder=encoder, data=folder):
        fixed = ("phase=search", f"data.path={data}", f"search.encoder.path={encoder}", f"runs={tmp_path / 'runs'}")
        return main(*fixed, "trainer.accelerator=cpu", *changes)

    return search


def facts(tmp_path, name="search-texts"):
    return json.loads((tmp_path / "runs" / name / "MANIFEST.json").read_text())


def sample(tmp_path, name="search-texts"):
    return json.loads((tmp_path / "runs" / name / "samples.jsonl").read_text())


def test_a_query_finds_passages_with_their_places(search, folder, tmp_path):
    done = search("query=the heron waits in the river", "search.tokens=20", "search.top=3")
    assert done.code == 0 and done.err == "", done.err
    found = sample(tmp_path)["passages"]
    assert len(found) == 3 and [p["score"] for p in found] == sorted((p["score"] for p in found), reverse=True)
    lines = (folder / "birds.md").read_text().split("\n")
    for passage in found:
        if passage["unit"] == "line" and passage["file"] == "birds.md":
            assert passage["text"] == "\n".join(lines[passage["first"] - 1 : passage["last"]])
        assert passage["place"] in done.out
    assert re.search(r"\d+ passages of 3 files: 3 embedded, 0 as they were; index made", done.out)
    told = facts(tmp_path)
    assert told["status"] == "done" and set(told["search"]["files"]) == {"birds.md", "law.txt", "rows.jsonl"}
    assert [p["role"] for p in told["parents"]] == ["encoder"] and len(told["parents"][0]["sha256"]) == 64
    assert (tmp_path / "runs/search-texts/report.html").is_file()


def test_what_is_unchanged_is_not_embedded_again(search, folder, tmp_path):
    """A second look computes nothing; of a changed, a new and a moved file only what is new; a removed one is gone."""
    first = search("query=an offer")
    entries = tmp_path / "runs/search-texts/index/entries"
    before = {p.name: p.stat().st_mtime_ns for p in entries.iterdir()}
    again = search("query=an offer")
    assert "0 embedded, 3 as they were; index as it was" in again.out
    assert again.out.splitlines()[-8:] == first.out.splitlines()[-8:]
    assert {p.name: p.stat().st_mtime_ns for p in entries.iterdir()} == before
    with open(folder / "law.txt", "a") as file:
        file.write("and the heron\n")
    (folder / "sub").mkdir()
    (folder / "birds.md").rename(folder / "sub/birds.md")
    (folder / "new.py").write_text("river = 'a fish'\n")
    third = search("query=an offer")
    assert "4 files: 2 embedded, 2 as they were; index made" in third.out
    assert facts(tmp_path)["search"]["embedded"] == ["law.txt", "new.py"]
    (folder / "rows.jsonl").unlink()
    fourth = search("query=an offer")
    assert "3 files: 0 embedded, 3 as they were; index made" in fourth.out
    assert not any(p["file"] == "rows.jsonl" for p in sample(tmp_path)["passages"])
    assert len(list(entries.iterdir())) == 3


def test_an_index_that_was_followed_is_one_made_anew(search, folder, tmp_path):
    search("query=an offer")
    (folder / "law.txt").write_text("the heron waits by an offer\n")
    search("query=an offer")
    followed = sample(tmp_path)["passages"]
    search("query=an offer", "name=anew")
    assert followed == sample(tmp_path, "anew")["passages"]


def test_other_rules_make_it_anew_and_a_graph_finds_the_same(search, tmp_path):
    search("query=an offer")
    exact = sample(tmp_path)["passages"]
    done = search("query=an offer", "search.index=hnsw")
    assert "0 embedded, 3 as they were; index made" in done.out and sample(tmp_path)["passages"] == exact
    assert "3 embedded" in search("query=an offer", "search.tokens=16").out


def test_another_encoders_index_is_refused(search, tmp_path):
    search("query=an offer")
    other = tiny_encoder(tmp_path / "other", seed=1)
    done = search("query=an offer", encoder=other)
    assert done.code == 2 and "is an index of the encoder" in done.err and "choose another name=" in done.err
    assert search("query=an offer", "search.encoder.max_length=30").code == 2, "its vectors are others, too"
    assert search("query=an offer", "search.encoder.batch=3").code == 0
    elsewhere = tmp_path / "copy/texts"
    shutil.copytree(tmp_path / "texts", elsewhere)
    done = search("query=an offer", data=elsewhere)
    assert done.code == 2 and f"not of data.path={elsewhere}; choose another name=" in done.err


@pytest.mark.parametrize("what", ["entries", "index.bin", "INDEX.json"])
def test_damage_is_named_and_made_good(what, search, tmp_path):
    search("query=an offer")
    sound, place = sample(tmp_path)["passages"], tmp_path / "runs/search-texts/index" / what
    path = next(place.iterdir()) if place.is_dir() else place
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + (b"\xff" if what == "INDEX.json" else bytes([content[at] ^ 1])) + content[at + 1 :])
    if what == "INDEX.json":
        path.write_bytes(content[:at])
    done = search("query=an offer")
    assert done.code == 0 and "damaged" in done.out and "made anew" in done.out
    assert sample(tmp_path)["passages"] == sound
    if what != "INDEX.json":
        assert len(facts(tmp_path)["search"]["damaged"]) == 1
    assert "damaged" not in search("query=an offer").out


def test_an_index_is_never_taken_for_that_of_other_files(search, folder, tmp_path):
    """What a kill between index and record leaves, and then the files as they were before: as many vectors, others."""
    (folder / "rows.jsonl").unlink()
    index = tmp_path / "runs/search-texts/index"
    law = (folder / "law.txt").read_text()
    (folder / "birds.md").write_text("the heron waits in the river\n")
    search("query=the heron waits")
    sound, record = sample(tmp_path)["passages"], (index / "INDEX.json").read_bytes()
    (folder / "birds.md").write_text(law)
    (folder / "law.txt").write_text("the heron waits in the river\n")
    search("query=the heron waits")
    (index / "INDEX.json").write_bytes(record)
    (folder / "birds.md").write_text("the heron waits in the river\n")
    (folder / "law.txt").write_text(law)
    done = search("query=the heron waits")
    assert sample(tmp_path)["passages"] == sound and sound[0]["file"] == "birds.md"
    assert "index made" in done.out and "damaged" not in done.out


def test_no_control_character_of_a_file_reaches_the_terminal(search, tmp_path):
    """Of a passage, a name, a message and an error: title, clear screen and the same in C1."""
    evil = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f"
    place = tmp_path / "evil"
    place.mkdir()
    (place / f"a{evil}.txt").write_text(f"the heron{evil} waits\tin the river\n")
    done = search("query=the heron", data=place)
    assert done.code == 0, done.err
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out + done.err)
    assert "\\x1b" in done.out and sample(tmp_path, "search-evil")["passages"][0]["text"].count("\x1b") == 2
    kept = next((tmp_path / "runs/search-evil/index/entries").iterdir())
    kept.write_bytes(kept.read_bytes()[:-1])
    damaged = search("query=the heron", data=place)
    assert "is damaged" in damaged.out and "\x1b" not in damaged.out
    (place / f"b{evil}.md").write_bytes(b"caf\xe9")
    failed = search("query=the heron", data=place)
    assert failed.code == 1 and "is not UTF-8" in failed.err
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", failed.out + failed.err)


def test_a_build_that_was_killed_goes_on(search, folder, encoder, fork, tmp_path):
    """kill -9 among 120 files: the next start embeds only those that were not done, and finds the same."""
    for i in range(120):
        (folder / f"{i}.txt").write_text(f"the heron {i} waits in the river\n" * (1 + i % 7))
    fixed = ("phase=search", f"data.path={folder}", f"search.encoder.path={encoder}", "query=an offer")
    process = fork(*fixed, f"runs={tmp_path / 'runs'}", "name=killed", "trainer.accelerator=cpu")
    entries, end = tmp_path / "runs/killed/index/entries", time.monotonic() + 100
    while not entries.is_dir() or len(list(entries.glob("*.bin"))) < 20:
        assert process.poll() is None and time.monotonic() < end, process.out + process.err
        time.sleep(0.005)
    process.kill()
    process.wait(30)
    done_before = len(list(entries.glob("*.bin")))
    assert done_before < 123 and not (entries.parent / "INDEX.json").is_file(), "it was at work"
    done = search("query=an offer", "name=killed")
    assert int(re.search(r"(\d+) embedded", done.out)[1]) <= 123 - done_before
    search("query=an offer", "name=unbroken")
    assert sample(tmp_path, "killed")["passages"] == sample(tmp_path, "unbroken")["passages"]


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["query=' '"], 2, "has no words; write what to look for"),
        (["query=a", "data.path="], 1, "phase=search needs data.path="),
        (["query=a", "domain=primer"], 2, "domain=primer has no data for phase=search"),
        ([f"query={'river ' * 60}"], 1, "the query is too long: a text has 62 tokens and the encoder reads 48"),
        (["query=a", "search.tokens=47"], 2, "search.tokens=47 must be from 16 to the 46 that the encoder reads"),
        (["query=a", "search.tokens=3"], 2, "search.tokens=3 must be from 16 to the 46"),
        (["query=a", "search.index=tree"], 2, "search.index='tree' is not one of exact, hnsw"),
        (["query=a", "search.encoder.path=nowhere"], 1, "the encoder nowhere is neither a folder nor one that can be"),
        (["query=a", "search.top=0"], 2, "search.top=0 must be greater than 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, code, said, search):
    done = search(*changes)
    assert (done.code, said in done.err) == (code, True), done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


def test_a_query_may_be_cut_if_that_is_said(search):
    done = search(f"query={'river ' * 60}", "search.encoder.too_long=cut")
    assert done.code == 0 and "longer than the encoder reads; only its first 46 tokens count" in done.out


def test_an_empty_folder_is_one_sentence(search, tmp_path):
    (tmp_path / "empty").mkdir()
    done = search("query=a", data=tmp_path / "empty")
    assert done.code == 1 and "no file under" in done.err and done.err.count("\n") == 1


def test_without_a_query_and_a_terminal_the_index_is_made_and_that_is_said(search, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    done = search()
    assert done.code == 0 and "the index is ready; ask with query='...'" in done.out


def test_in_a_terminal_it_asks_again_and_again(encoder, folder, cache, tmp_path):
    """A real one: two queries, of which the first is too long, then Ctrl-D."""
    ours, theirs = pty.openpty()
    words = ["phase=search", f"data.path={folder}", f"search.encoder.path={encoder}", f"runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(
        [sys.executable, "launch.py", *words, "trainer.accelerator=cpu", "search.top=10"], cwd=ROOT, text=True,
        stdin=theirs,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "TRIVIUM_CACHE": str(cache), "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    out = ""
    for line in ("river " * 60, "", "an offer", "/exit"):
        while not out.endswith("you: "):  # as a person does, who waits until asked
            piece = process.stdout.read(1)
            assert piece, out
            out += piece
        os.write(ours, f"{line}\n".encode())
        out += "\n"
    out += process.communicate(timeout=120)[0]
    os.close(ours)
    assert process.returncode == 0, out
    assert "the query is too long" in out and "law.txt:1" in out and "Traceback" not in out
    assert sample(tmp_path)["prompt"] == "an offer"


# ---- answers


def test_an_answer_lists_the_passages_that_the_model_was_shown(search, tuned, tmp_path):
    """The model's context of 256 tokens holds fewer than were found; what it was not shown is no source."""
    few = ("search.tokens=16", "search.top=8", "inference.sampling.max_tokens=8", f"init_from={tuned}")
    done = search("query=an offer", *few, "system=Short.")
    assert done.code == 0, done.err
    told = sample(tmp_path)
    places = [p["place"] for p in told["passages"]]
    assert 0 < len(told["sources"]) <= len(places) == 8 and told["sources"] == places[: len(told["sources"])]
    after = done.out[done.out.rindex(f"[1] {told['sources'][0]}") :]
    assert re.findall(r"\[\d+\] (\S+(?: row \d+)?)", after) == told["sources"]
    assert set(told["cited"]) <= set(range(1, len(told["sources"]) + 1))
    assert [p["role"] for p in facts(tmp_path)["parents"]] == ["init_from", "encoder"]
    done = search("query=an offer", *few, "inference.sampling.max_tokens=250")
    assert done.code == 2 and "not one passage fits" in done.err


def test_a_reward_model_answers_nothing(search, fork, rewarding, tmp_path):
    made = fork(*rewarding(tmp_path / "runs", "judge", "trainer.max_steps=2")).done()
    assert made.returncode == 0, made.err
    done = search("query=an offer", f"init_from={tmp_path / 'runs/judge'}")
    assert done.code == 1 and "is a reward model: it scores answers and writes none" in done.err


def test_the_prompt_has_the_numbered_passages_and_the_question():
    sources = [Source("a.md", Passage(3, 5, "text one"), 0.9), Source("b.jsonl", Passage(2, 2, "text two", "row"), 0.5)]
    said = asked("why?", sources)
    assert said.endswith("[1] a.md:3-5\ntext one\n\n[2] b.jsonl row 2\ntext two\n\nQuestion: why?")
    assert cited("So [2], and [1,3].", 2) == ([1, 2], [3])


def test_real_words_are_found_by_what_they_mean(search, tmp_path):
    """The real encoder: not one word of the query is in the passage that answers it."""
    place = tmp_path / "kitchen"
    place.mkdir()
    (place / "bread.md").write_text("Flour, water and yeast; knead, let it rise, an hour in the oven.\n")
    (place / "law.md").write_text("A contract needs an offer and its acceptance by two parties.\n")
    (place / "code.py").write_text("def add(a, b):\n    return a + b\n")
    for query, name in (
        ("baking a loaf", "bread.md"),
        ("legally binding agreements", "law.md"),
        ("sum function", "code.py"),
    ):
        done = search(f"query={query}", "search.top=1", encoder=minilm(), data=place)
        assert done.code == 0, done.err
        assert sample(tmp_path, "search-kitchen")["passages"][0]["file"] == name
