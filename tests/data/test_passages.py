"""Files cut into passages: nothing is lost but blank lines, nothing is too long, and each says where it is."""

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trivium.data.config import FilesConfig
from trivium.data.passages import Passage, _halved, cut, files_to_search, passages_of
from trivium.errors import DataError

ROOT = Path(__file__).parents[2]


def words(texts):
    """A token a word, and one a character of a word beyond its first ten: long words are many tokens."""
    return [sum(1 + max(0, len(w) - 10) for w in t.split()) for t in texts]


def read(path, most=50, **settings):
    config = FilesConfig(path=str(path), validation_share=0.0, **settings)
    (file,), _ = files_to_search(config)
    return passages_of(file, config, most, words)


@pytest.mark.parametrize("most", [7, 40, 200])
@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/models.md", "core/trivium/build.py"])
def test_every_word_of_a_page_is_in_one_passage_at_its_lines(page, most):
    text = (ROOT / page).read_text()
    lines, found = text.split("\n"), cut(text, most, words)
    assert max(words([p.text for p in found])) <= most
    assert "".join("".join(p.text.split()) for p in found) == "".join(text.split())
    for passage in found:
        there = "\n".join(lines[passage.first - 1 : passage.last])
        assert passage.text == there or (passage.first == passage.last and passage.text in there)
    assert [p.first for p in found] == sorted(p.first for p in found)


def test_passages_are_whole_paragraphs_and_as_full_as_can_be():
    """Of three words each, with room for seven: two and two; one of nine is cut at its lines."""
    text = "a b c\n\nd e f\n\n\ng h i\n\nj k l\n\n1 2 3\n4 5 6\n7 8 9"
    found = [(p.first, p.last, p.text) for p in cut(text, 7, words)]
    assert found == [
        (1, 3, "a b c\n\nd e f"), (6, 8, "g h i\n\nj k l"), (10, 11, "1 2 3\n4 5 6"), (12, 12, "7 8 9")
    ]  # fmt: skip


def test_a_long_line_is_cut_at_words_and_a_long_word_at_characters():
    assert [p.text for p in cut("one two three four five", 2, words)] == ["one two", "three four", "five"]
    found = cut(f"a {'x' * 95} b", 30, words)
    assert "".join(p.text for p in found).replace(" ", "") == "a" + "x" * 95 + "b"
    assert max(words([p.text for p in found])) <= 30 and {p.first for p in found} == {1}
    assert cut(" \n\n \n", 5, words) == [] == cut("", 5, words)


def halved_simply(passage, most, count):
    """The same in quadratic time: one piece more until it is too many, and what is left copied each time."""
    parts, first, found = passage.text.split("\n"), passage.first, []
    by_line = len(parts) > 1
    if not by_line:
        parts = re.findall(" |[^ ]+ ?", passage.text.strip(" "))
        parts = parts if len(parts) > 1 else list(passage.text.strip(" "))
    while parts:
        n = 0
        texts = ("\n".join(parts[:i]) if by_line else "".join(parts[:i]).strip(" ") for i in range(1, len(parts) + 1))
        said, fits = parts[0], ""
        for text in texts:
            if count([text])[0] > most:
                break
            n, fits = n + 1, text
        whole = Passage(first, first + max(n - 1, 0) * by_line, fits if n else said)
        if n:
            found.append(whole)
        elif by_line or len(said) > 1:
            found += halved_simply(whole, most, count)
        first, parts = first + max(n, 1) * by_line, parts[max(n, 1) :]
    return [p for p in found if p.text.strip()]


def test_what_is_too_long_is_cut_as_a_simple_slow_way_cuts_it():
    """300 random texts of long and short lines, words, spaces and blanks."""
    draw = random.Random(0)
    for _ in range(300):
        signs = draw.choices(["a", "b ", " ", "\n", "x" * 25, "é, "], [8, 8, 1, 2, 1, 2], k=draw.randint(1, 120))
        text = "".join(signs)
        lines = text.split("\n")
        most, whole = draw.randint(3, 20), Passage(5, 4 + len(lines), text)
        assert _halved(whole, most, words) == halved_simply(whole, most, words), (text, most)


def test_a_line_without_spaces_is_looked_at_about_as_often_as_it_is_long():
    """Eight times as long, at most nine times the characters looked at: the time and memory of a slice are of its own
    length, so this is what it costs."""
    looked = []

    def quarters(texts):
        looked.extend(map(len, texts))
        return [(len(t) + 3) // 4 for t in texts]

    costs = []
    for size in (20_000, 160_000):
        looked.clear()
        found = cut("x" * size, 64, quarters)
        assert [len(p.text) for p in found] == [256] * (size // 256) + [size % 256] * (size % 256 > 0)
        costs.append(sum(looked))
    assert costs[1] <= 9 * costs[0]


def test_two_megabytes_in_a_line_take_little_memory():
    text, quarters = "x" * 2_000_000, lambda texts: [(len(t) + 3) // 4 for t in texts]
    tracemalloc.start()
    try:
        found = cut(text, 256, quarters)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 1954 and most < 40e6, f"{most / 1e6:.0f} MB"


def test_rows_are_read_as_for_training_and_known_by_their_number(tmp_path):
    rows = [{"text": "a heron"}, {"text": "w " * 70}, {"text": "a fish"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found, left_out = read(path)
    assert [(p.first, p.last, p.unit) for p in found] == [(n, n, "row") for n in (1, 2, 2, 3)] and left_out == {}
    chat = tmp_path / "b.jsonl"
    chat.write_text(
        json.dumps({"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]})
    )
    assert [p.text for p in read(chat)[0]] == ["why?\nso"]
    table = tmp_path / "c.csv"
    table.write_text("title,body\nx,the river\ny,the sea\n")
    assert [p.text for p in read(table, text_column="body")[0]] == ["the river", "the sea"]
    assert [p.text for p in read(table)[0]] == ["title,body\nx,the river\ny,the sea"], "no schema: lines of text"


def test_code_text_and_rows_of_one_folder_are_read_and_the_rest_counted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("# Title\n\ntext")
    (tmp_path / "sub/b.py").write_text("def f():\n    return 1\n")
    (tmp_path / "c.json").write_text('{"name": "package", "private": true}')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "e.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "f.txt").write_bytes(b"bin\0ary")
    (tmp_path / "g.txt").write_text("  \n")
    (tmp_path / ".hidden").write_text("x")
    config = FilesConfig(path=str(tmp_path), validation_share=0.0)
    files, left_out = files_to_search(config)
    assert [f.name for f in files] == ["a.md", "c.json", "d.txt.gz", "sub/b.py"]
    assert dict(left_out) == {"hidden files": 1, "binary files": 1, "empty files": 1, "files of other kinds": 1}
    texts = {f.name: "".join(p.text for p in passages_of(f, config, 50, words)[0]) for f in files}
    assert texts["d.txt.gz"] == "packed" and "package" in texts["c.json"] and texts["sub/b.py"].startswith("def f")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", b"\0\1", "is not a known kind"),
        ("a.txt", b"a\0b", r"a.txt is binary"),
        ("a.txt", b"  \n", r"a.txt is empty"),
        ("a.md", b"caf\xe9", "a.md line 1 is not UTF-8: byte 3 is 0xe9; data.bad_rows=skip leaves such files and rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text":', "a.jsonl line 2 is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_a_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as told:
        read(tmp_path / name)
    assert "\n" not in str(told.value)


def test_bad_files_and_rows_may_be_left_out_and_are_counted(tmp_path):
    (tmp_path / "a.md").write_bytes(b"caf\xe9")
    assert read(tmp_path / "a.md", bad_rows="skip") == ([], {"not UTF-8": 1})
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text":\n')
    found, left_out = read(tmp_path / "b.jsonl", bad_rows="skip")
    assert [p.text for p in found] == ["a"] and left_out == {"not JSON": 1}


PRETTY = '{\n "a": "the sea",\n "b": 2\n}\n'
ODD = [
    ("pretty.json", PRETTY, "sea", {}),
    ("tsconfig.json", '{\n // the sea\n "a":1}\n', "sea", {}),
    ("list.json", '["the sea", "b"]', "sea", {}),
    ("value.json", '{"text": 5, "name": "sea"}', "sea", {}),
    ("broken.json", '[{"text": "the sea"}, {"text":', "sea", {}),
    ("none.json", "[]", None, {"empty files": 1}),
    ("empty.jsonl", "", None, {"empty files": 1}),
    ("blank.jsonl", "\n\n", None, {"empty files": 1}),
    ("other.jsonl", '{"a": "sea"}\nno JSON\n', "no JSON", {}),
    ("empty.csv", "", None, {"empty files": 1}),
    ("ragged.csv", "a,b\nthe sea,2\n1,2,3\n", "1,2,3", {}),
    ("ragged_text.csv", "text\na,b,sea\n", "sea", {}),
    ("twice.csv", "a,a\nthe sea,2\n", "sea", {}),
    ("broken.parquet", "no parquet", None, {"damaged files": 1}),
    ("broken.arrow", "no arrow", None, {"damaged files": 1}),
    ("broken.jsonl.gz", "no gzip", None, {"damaged files": 1}),
    ("broken.txt.gz", "no gzip", None, {"damaged files": 1}),
    ("other.parquet", pa.table({"a": [1], "b": ["x"]}), None, {"tables of unknown columns": 1}),
    ("empty.parquet", pa.table({"text": pa.array([], pa.string())}), None, {"empty files": 1}),
]


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
@pytest.mark.parametrize(("name", "content", "said", "gone"), ODD, ids=[odd[0] for odd in ODD])
def test_an_odd_file_is_read_as_text_or_left_out_and_stops_nothing(name, content, said, gone, bad_rows, tmp_path):
    path = tmp_path / name
    path.write_text(content) if isinstance(content, str) else pq.write_table(content, path)
    found, left_out = read(path, bad_rows=bad_rows)
    assert left_out == gone
    if said is None:
        assert found == []
    else:
        assert said in found[-1].text and {p.unit for p in found} == {"line"}
        assert "\n".join(p.text for p in found) == content.strip("\n")


def test_a_file_with_a_damaged_row_group_is_left_out_or_with_skip_that_group(tmp_path):
    texts, path = [f"the sea {i:02}" for i in range(30)], tmp_path / "a.parquet"
    how = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, **how)
    path.write_bytes(path.read_bytes().replace(b"the sea 15", b"the tea 15"))
    assert read(path) == ([], {"damaged files": 1})
    found, left_out = read(path, bad_rows="skip")
    assert left_out == {"in a damaged row group": 10}
    assert [(p.first, p.text) for p in found] == [(i + 1, texts[i]) for i in (*range(10), *range(20, 30))]


@pytest.mark.parametrize("name", ["pretty.json", "empty.jsonl", "broken.parquet", "other.parquet", "ragged_text.csv"])
def test_a_chosen_column_is_never_guessed_past(name, tmp_path):
    content = next(odd[1] for odd in ODD if odd[0] == name)
    path = tmp_path / name
    path.write_text(content) if isinstance(content, str) else pq.write_table(content, path)
    with pytest.raises(DataError, match=name):
        read(path, text_column="text")


@pytest.mark.parametrize("made", ["empty", "binary", "missing", "none"])
def test_nothing_to_read_is_one_sentence(made, tmp_path):
    place = tmp_path / made
    if made != "missing":
        place.mkdir()
    if made == "binary":
        (place / "a.txt").write_bytes(b"\0")
    said = {"empty": "no file under", "binary": r"no file under .*1 binary files", "missing": "does not exist",
            "none": "phase=search needs data.path="}[made]  # fmt: skip
    with pytest.raises(DataError, match=said) as told:
        files_to_search(FilesConfig(path="" if made == "none" else str(place)))
    assert not re.search("\n", str(told.value))
