"""A user's own files: what is read, what is held out, and one clear sentence for everything that cannot be used."""

import gzip
import json

import datasets
import pytest

from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.data.find import find_files
from trivium.data.readers import DOCUMENT
from trivium.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


PAIRS = [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(200)]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def test_jsonl_pairs_are_read_in_order(tmp_path):
    source = Files(FilesConfig(path=write(tmp_path / "a.jsonl", PAIRS), validation_share=0.0))
    assert len(source) == 200
    assert source[7] == {"id": f"{tmp_path}/a.jsonl:8", "prompt": "question 7", "completion": " answer 7"}


def test_parquet_csv_and_json_give_the_same_rows(tmp_path):
    table = datasets.Dataset.from_list(PAIRS)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps(PAIRS))
    for name in ("a.parquet", "a.csv", "a.json"):
        source = Files(FilesConfig(path=str(tmp_path / name), validation_share=0.0))
        assert [source[i]["completion"] for i in range(200)] == [p["completion"] for p in PAIRS], name


def test_messages_keep_only_role_and_content(tmp_path):
    rows = [{"messages": [{**m, "name": "x"} for m in CHAT["messages"]]}, CHAT]
    source = Files(FilesConfig(path=write(tmp_path / "a.jsonl", rows), validation_share=0.0))
    assert source[0]["messages"] == source[1]["messages"] == CHAT["messages"]


def test_splits_are_disjoint_complete_and_by_content(tmp_path):
    """A duplicate of a held-out row is held out too, wherever it stands."""
    path = write(tmp_path / "a.jsonl", PAIRS + PAIRS)
    train = Files(FilesConfig(path=path, validation_share=0.2))
    held = Files(FilesConfig(path=path, validation_share=0.2, split="validation"))
    said = [{s[i]["prompt"] for i in range(len(s))} for s in (train, held)]
    assert said[0].isdisjoint(said[1])
    assert len(train) + len(held) == 400
    assert len(held) == 2 * len(said[1])
    assert 20 <= len(said[1]) <= 60  # 40 expected, five standard deviations are 28


def test_validation_path_is_used_whole(tmp_path):
    path, other = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", PAIRS[:3])
    assert len(Files(FilesConfig(path=path, validation_path=other))) == 200
    assert len(Files(FilesConfig(path=path, validation_path=other, split="validation"))) == 3
    assert len(Files(FilesConfig(validation_path=other, split="validation"))) == 3


def test_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"{i} " + "word " * 100 for i in range(40)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text)
    source = Files(FilesConfig(path=str(tmp_path / "a.txt"), validation_share=0.0))
    pieces = [source[i]["text"] for i in range(len(source))]
    assert "\n\n".join(pieces) == text
    assert all(DOCUMENT <= len(p) < DOCUMENT + 600 for p in pieces[:-1])


@pytest.mark.parametrize("name", ["UP.JSONL", "a.ndjson"])
def test_other_spellings_of_a_kind(tmp_path, name):
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    source = Files(FilesConfig(path=str(tmp_path), validation_share=0.0))
    assert [source[i]["text"] for i in range(len(source))] == ["one", "two"]


def test_folder_and_glob_name_the_same_files(tmp_path):
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / name).write_text("some text")
    assert [p.name for p in find_files(str(tmp_path)).files] == ["a.md", "b.txt"]
    assert [p.name for p in find_files(str(tmp_path / "*.*")).files] == ["a.md", "b.txt"]


def test_fingerprint_follows_the_content(tmp_path):
    a = Files(FilesConfig(path=write(tmp_path / "a.jsonl", PAIRS), validation_share=0.0)).fingerprint
    assert Files(FilesConfig(path=write(tmp_path / "a.jsonl", PAIRS), validation_share=0.0)).fingerprint == a
    changed = [*PAIRS[:-1], {"prompt": "question 199", "completion": " answer 200"}]
    assert Files(FilesConfig(path=write(tmp_path / "a.jsonl", changed), validation_share=0.0)).fingerprint != a


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b'{"text": "a"}\n{"text": b}\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n[1, 2]\n', "line 2 is not a JSON object"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8"),
        (b'{"txt": "a"}\n', r"columns txt; known are .*; nearest: text .text.; set 'data.columns=..text=txt..'$"),
        (b'{"messages": "a"}\n', "row 1: messages must be a list"),
        (b'{"text": "a"}\n{"text": null}\n', "row 2: text is None, not text"),
        (b'{"prompt": "a", "completion": 3}\n', "row 1: completion is 3, not text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        Files(FilesConfig(path=str(path)))
    assert str(path) in str(error.value)


def test_other_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "a.bin").write_bytes(b"x")
    with gzip.open(tmp_path / "a.gz", "wb") as f:
        f.write(b"x")
    for name, says in {
        "latin.txt": "not UTF-8: byte 3 is 0xe9",
        "half.parquet": "cannot be read as parquet",
        "a.bin": "not a known kind",
        "a.gz": "not a known kind",
        "missing.txt": "does not exist",
        "*.nothing": "matches no file",
    }.items():
        with pytest.raises(DataError, match=says):
            Files(FilesConfig(path=str(tmp_path / name)))
    with pytest.raises(DataError, match="needs data.path"):
        Files(FilesConfig())


def test_nothing_held_out_says_what_to_set(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS[:2])
    with pytest.raises(DataError, match="set data.validation_path, or validation.every_steps=0"):
        Files(FilesConfig(path=path, validation_share=0.0, split="validation"))


def test_cells_that_look_like_numbers_dates_or_nothing_stay_text(tmp_path):
    """Answers such as 5, NA, null and 2024-01-05 are text; a reader that guesses types would lose them."""
    answers = ["5", "NA", "null", "2024-01-05", "007"]
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"q{i},{a}\n" for i, a in enumerate(answers)))
    dates = [{"prompt": f"day {i}", "completion": f"2024-01-0{i}"} for i in range(1, 5)]
    for path, wanted in (
        (str(tmp_path / "a.csv"), answers),
        (write(tmp_path / "b.jsonl", dates), [d["completion"] for d in dates]),
    ):
        source = Files(FilesConfig(path=path, validation_share=0.0))
        assert [source[i]["completion"] for i in range(len(source))] == wanted


def test_files_of_one_name_in_two_folders_keep_their_own_rows(tmp_path):
    for folder, word in (("a", "alpha"), ("b", "beta")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "data.jsonl", [{"prompt": folder, "completion": word}])
    source = Files(FilesConfig(path=str(tmp_path), validation_share=0.0))
    assert [source[i]["completion"] for i in range(2)] == ["alpha", "beta"]
    assert source[0]["id"] != source[1]["id"]
