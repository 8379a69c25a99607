"""Every kind of file gives the rows that were written, plain and compressed; a tree of code gives its files."""

import bz2
import gzip
import json
import lzma
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from trivium.data import adapted, readers
from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.data.find import find_files
from trivium.data.readers import DOCUMENT
from trivium.errors import DataError

PAIRS = [{"prompt": f'question "{i}",\nof two lines', "completion": f" ánswer {i}"} for i in range(300)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


def read(path, **settings):
    source = Files(FilesConfig(path=str(path), validation_share=0.0, **settings))
    return [source[i] for i in range(len(source))]


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def arrow(rows, new, **how):
    sink = pa.BufferOutputStream()
    with new(sink, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows), **how)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=70)
    return sink.getvalue().to_pybytes()


def table(rows, separator=","):
    cell = '"{}"'.format
    said = [separator.join(cell(v.replace('"', '""')) for v in r.values()) for r in rows]
    return "\r\n".join([f"prompt{separator}completion", *said]).encode()


WRITTEN = {
    "a.jsonl": lines(PAIRS),
    "mark.jsonl": b"\xef\xbb\xbf" + lines(PAIRS),
    "last.jsonl": lines(PAIRS).rstrip(b"\n"),
    "blank.jsonl": lines(PAIRS) + b"\n  \n",
    "a.json": json.dumps(PAIRS, indent=1).encode(),
    "close.json": json.dumps(PAIRS, separators=(",", ":"), ensure_ascii=False).encode(),
    "lines.json": lines(PAIRS),
    "a.csv": table(PAIRS),
    "mark.csv": b"\xef\xbb\xbf" + table(PAIRS) + b"\r\n",
    "a.tsv": table(PAIRS, "\t"),
    "a.parquet": parquet(PAIRS),
    "a.arrow": arrow(PAIRS, pa.ipc.new_file, max_chunksize=70),
    "stream.arrow": arrow(PAIRS, pa.ipc.new_stream, max_chunksize=70),
}
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", WRITTEN)
def test_rows_of_every_kind_are_what_was_written(name, packed, tmp_path):
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](WRITTEN[name]))
    found = read(path)
    assert [{k: v for k, v in row.items() if k != "id"} for row in found] == PAIRS
    assert [row["id"] for row in found] == [f"{path}:{i}" for i in range(1, 301)]
    assert [row["id"] for row in reversed(read(path))] == [row["id"] for row in reversed(found)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst"])
def test_text_of_every_kind(name, packed, tmp_path):
    (tmp_path / f"{name}{packed}").write_bytes(PACK[packed]("Ein Reiher wartet.\n\nNoch einer, größer.".encode()))
    (row,) = read(tmp_path / f"{name}{packed}")
    assert row == {"id": f"{tmp_path}/{name}{packed}:1", "text": "Ein Reiher wartet.\n\nNoch einer, größer."}


def test_frames_and_members_one_after_the_other_are_one_file(tmp_path):
    """As `cat a.gz b.gz` makes them, and compressors that work on several cores."""
    for suffix, pack in PACK.items():
        path = tmp_path / f"a.jsonl{suffix}"
        for padding in (b"", b"\0" * 8) if suffix == ".xz" else (b"",):
            path.write_bytes(pack(lines(PAIRS[:100])) + padding + pack(lines(PAIRS[100:])) + padding)
            assert len(read(path)) == 300


def cut(text):
    """Documents as the whole text in memory would be cut: the definition, in the fewest words."""
    pieces, piece, size = [], [], 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= DOCUMENT and "".join(piece).strip():
            pieces.append("\n\n".join(piece))
            piece, size = [], 0
    return pieces + ["\n\n".join(piece)] * bool("".join(piece).strip())


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_text_found_by_offsets_is_cut_as_text_in_memory(ending, tmp_path):
    draw = random.Random(0)
    for case in range(20):
        words = ["ä" * draw.randint(1, 3000), "word " * draw.randint(1, 900) + "x", "y"]
        text = "".join(draw.choice(words) + draw.choice(["\n", "\n\n", "\n\n"]) for _ in range(60))
        (tmp_path / "a.txt").write_bytes(text.replace("\n", ending).encode())
        assert [row["text"] for row in read(tmp_path / "a.txt")] == cut(text), case


def test_many_blank_lines_lose_nothing_but_line_breaks(tmp_path):
    draw = random.Random(1)
    text = "".join(draw.choices(["a" * 900, "\n", "\n\n\n", "b\n", " \n"], k=2000))
    (tmp_path / "a.txt").write_text(text)
    texts = [row["text"] for row in read(tmp_path / "a.txt")]
    assert "".join(texts).replace("\n", "") == text.replace("\n", "") and len(texts) > 50
    assert all(len(t) >= DOCUMENT - 2 for t in texts[:-1])


def test_text_without_blank_lines_is_cut_at_the_end_of_a_line(tmp_path):
    """100,000 characters are 25 times a document: lines of 100, so 1,000 of them in each."""
    line = "a" * 99 + "\n"
    (tmp_path / "a.txt").write_text(line * 2500)
    texts = [row["text"] for row in read(tmp_path / "a.txt")]
    assert [len(t) for t in texts] == [99_999, 99_999, 50_000] and "\n".join(texts) == line * 2500


def test_a_tree_of_code_gives_each_file_under_its_path(tmp_path):
    tree = tmp_path / "tree"
    files = {
        "main.py": "print('é')\n", "src/lib.rs": "fn main() {}\r\n", "README.md": "# Tree\n\nWords.", "empty.py": "\n",
        ".git/config.py": "x", "node_modules/left/pad.js": "x", "src/__pycache__/a.py": "x", "data.bin": "x",
        "package.json": "{}", ".hidden.py": "x",
    }  # fmt: skip
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(text.encode())
    (tree / "blob.c").write_bytes(b"int\0\x01\x02")
    source = Files(FilesConfig(path=str(tree), code=True, validation_share=0.0))
    assert [source[i] for i in range(len(source))] == [
        {"id": f"{tree}/README.md", "text": "# Tree\n\nWords."},
        {"id": f"{tree}/main.py", "text": "print('é')\n"},
        {"id": f"{tree}/src/lib.rs", "text": "fn main() {}\n"},
    ]
    assert source.notes == {
        "rows": 3,
        "left_out": {
            "binary files": 1, "empty files": 1, "files of other kinds": 2, "folders __pycache__": 1,
            "folders node_modules": 1, "hidden files": 1, "hidden folders": 1,
        },
    }  # fmt: skip
    assert [source.origin(source[i]) for i in range(3)] == [".md", ".py", ".rs"]


def test_a_tree_of_code_is_read_by_any_spelling(tmp_path):
    """Text beside the code as the code itself: .R is how R is spelled, .F90 how Fortran often is."""
    names = ["README.MD", "NOTES.Txt", "model.R", "solve.F90", "Main.PY", "blob.BIN"]
    for name in names:
        (tmp_path / name).write_text(f"this is {name}")
    source = Files(FilesConfig(path=str(tmp_path), code=True, validation_share=0.0))
    assert {e["id"]: e["text"] for e in map(source.__getitem__, range(len(source)))} == {
        f"{tmp_path}/{name}": f"this is {name}" for name in names[:-1]
    }
    assert source.notes == {"rows": 5, "left_out": {"files of other kinds": 1}}
    assert read(tmp_path / "model.R")[0]["text"] == "this is model.R"
    found = find_files(str(tmp_path), every=True)
    assert [p.name for p in found.files] == sorted(names[:-1])


def test_code_is_read_without_being_asked_for_where_nothing_else_is(tmp_path):
    (tmp_path / "a.py").write_text("a = 1")
    assert find_files(str(tmp_path)).code and [r["text"] for r in read(tmp_path)] == ["a = 1"]
    assert [r["text"] for r in read(tmp_path / "a.py")] == ["a = 1"]
    (tmp_path / "b.txt").write_text("words")
    assert [r["text"] for r in read(tmp_path)] == ["words"], "a folder of data stays one"


def test_what_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert [row["prompt"] for row in read(tmp_path / "saved")] == [row["prompt"] for row in PAIRS]


def test_one_column_of_many_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"content": "a = 1", "text": "no", "stars": 3}]))
    assert read(tmp_path / "a.jsonl", text_column="content")[0]["text"] == "a = 1"
    with pytest.raises(DataError, match="has the columns content, text, stars, and none .* Did you mean content?"):
        read(tmp_path / "a.jsonl", text_column="contents")


def test_columns_by_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"frage": "2 + 2 =", "antwort": " 4", "prompt": None}]))
    (row,) = read(tmp_path / "a.jsonl", columns=["prompt=frage", "completion=antwort"])
    assert (row["prompt"], row["completion"]) == ("2 + 2 =", " 4")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(PAIRS))
    source = Files(FilesConfig(path=str(path), validation_share=0.0))
    path.write_bytes(lines(PAIRS[::-1]) + b" ")
    from trivium.data.rows import _opened

    _opened.cache_clear()  # as after so many other files
    with pytest.raises(DataError, match="has changed since its rows were found; start again"):
        source[5]


def test_unpacked_files_are_made_once_and_leave_no_halves(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(PAIRS)))
    read(path)
    (made,) = (tmp_path / "cache/converted").glob("*/a.jsonl")
    before = made.stat().st_ino
    read(path)
    assert made.stat().st_ino == before and sorted(p.name for p in made.parent.iterdir()) == [".lock", "a.jsonl"]


PROGRAM = """
import re, sys
from trivium.data import adapted, readers
from trivium.data.config import FilesConfig
from trivium.data.files import Files
source = Files(FilesConfig(path=sys.argv[1], validation_share=0.0))
total = sum(len(source[i]["text"]) for i in range(len(source)))
print(total, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_data(kind, tmp_path):
    """5 MB and 50 MB of text: the peak of the second is at most 35 MB above the first's, what buffers there are; held
    whole it would be 45 and more. The numbers of 5,000 rows are 80 kB."""
    peaks = []
    for size in (500, 5000):
        texts = [f"{i} " + "heron " * 1700 for i in range(size)]
        path = tmp_path / f"{size}.{kind}"
        if kind == "txt":
            path.write_text("\n\n".join(texts))
        elif kind == "jsonl":
            path.write_bytes(lines([{"text": t} for t in texts]))
        else:
            pq.write_table(pa.table({"text": texts}), path, row_group_size=500, use_dictionary=False)
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
        total, peak = map(int, done.stdout.split())
        assert total == sum(map(len, texts))
        peaks.append(peak / 1000)
    assert peaks[1] - peaks[0] < 35, peaks


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_rows_are_looked_at_once_while_a_file_is_as_it_was(name, tmp_path, monkeypatch):
    """A second source of the same bytes reads a row for its columns and no more; of others it reads all."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / name
    texts = [f"line {i} " + "of a long text about herons " * 160 for i in range(30)]
    head = {"a.jsonl": "", "a.txt": "", "a.csv": "text\n"}[name]

    def write(texts):
        lines = {"a.jsonl": (json.dumps({"text": t}) + "\n" for t in texts), "a.txt": (t + "\n\n" for t in texts),
                 "a.csv": (t + "\n" for t in texts)}[name]  # fmt: skip
        file.write_text(head + "".join(lines))

    looked = []
    monkeypatch.setattr(Files, "_look_at", lambda self, table: looked.append(1) or look(self, table))
    look = adapted.Adapted._look_at

    def source(**more):
        return Files(FilesConfig(path=str(file), validation_share=0.3, **more))

    write(texts)
    first, again = source(), source()
    assert len(looked) == 1 and again.fingerprint == first.fingerprint and again.notes == first.notes
    assert [again[i] for i in range(len(again))] == [first[i] for i in range(len(first))]
    held = source(split="validation")
    assert len(looked) == 2 and len(held) + len(first) == 30 and held.fingerprint != first.fingerprint
    write([text[1:] for text in texts])
    assert source().fingerprint != first.fingerprint and len(looked) == 3
    write(texts)
    for path in (tmp_path / "cache/read").iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert source().fingerprint == first.fingerprint and len(looked) == 4, "a damaged note is no note"


def test_what_holds_a_bad_row_is_looked_at_every_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n{"text": "three"}\n')
    for _ in range(2):
        source = Files(FilesConfig(path=str(tmp_path / "a.jsonl"), validation_share=0.0, bad_rows="skip"))
        assert source.notes["skipped"] == {"does not fit the schema": 1} and len(source) == 2
    assert not (tmp_path / "cache/read").exists()


def cut_line_by_line(content, least, patience):
    """Where documents begin and end, one line after the other: at a blank line once there are `least` characters, or at
    any line's end once there are `patience` times as many. A document without a word takes what follows."""
    found, start, at, size, said, before = [], 0, 0, 0, False, 0
    for line in re.findall(b"[^\n]*\n|[^\n]+$", content):
        at, ending = at + len(line), line.endswith(b"\n") + line.endswith(b"\r\n")
        size += len(line.decode()) - (ending == 2)
        said |= bool(line.strip())
        blank = len(line) == ending and size >= least
        if said and (blank or (ending and size >= patience * least)):
            found.append((start, at - ending - before * blank))
            start, size, said = at, 0, False
        before = ending
    return [*found, (start, at)] if said else found


@pytest.mark.parametrize("least", [1, 7, 40])
def test_text_is_cut_as_if_line_by_line(least, tmp_path, monkeypatch):
    """Lines of 0 to 60 characters of one to four bytes, some blank, some of spaces, ending in either way or not at all;
    what is read at once is no more than part of a line, one line, or several."""
    monkeypatch.setattr(readers, "DOCUMENT", least)
    monkeypatch.setattr(readers, "PATIENCE", 5)
    draw, cuts = random.Random(least), 0
    for number in range(200):
        lines = []
        for _ in range(draw.randrange(1, 25)):
            said = "".join(draw.choices("ab é€𝄞", k=draw.choice((0, 0, 0, 3, 12, 60)))) + draw.choice(("", "", " "))
            lines.append(said.encode() + draw.choice((b"\n", b"\n", b"\r\n")))
        content = b"".join(lines)[: draw.choice((None, -1))]
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        rows = readers.Documents(path, 10**6)
        assert list(zip(rows._starts, rows._ends, strict=True)) == cut_line_by_line(content, least, 5), content
        cuts += len(rows)
    assert cuts > 300
