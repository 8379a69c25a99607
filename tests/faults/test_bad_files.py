"""Broken, hostile and endless files: one sentence with the file and the row, in seconds, and nothing is filled up."""

import bz2
import gzip
import json
import lzma
import pickle
import random
import resource
import shutil
import struct
import time

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from trivium.data import arrow as arrow_files
from trivium.data import converted
from trivium.data.config import FilesConfig
from trivium.data.files import Files
from trivium.data.position import Order
from trivium.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache_of_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(path, **settings):
    source = Files(FilesConfig(path=str(path), validation_share=0.0, **settings))
    return [source[i] for i in range(len(source))]


def refused(path, content, says, **settings):
    """The one sentence; content: bytes to write first."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read(path, **settings)
    said = str(error.value)
    assert str(path) in said and "\n" not in said and len(said) < 500, said
    return said


GOOD = [{"text": f"row {i}"} for i in range(50)]
LINES = "".join(json.dumps(r) + "\n" for r in GOOD).encode()
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def arrow(rows, new=pa.ipc.new_file):
    sink = pa.BufferOutputStream()
    with new(sink, pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows), max_chunksize=20)
    return sink.getvalue().to_pybytes()


# ---- rows


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"one\n\ncaf\xe9", r"a.txt line 3 is not UTF-8: byte 8 is 0xe9"),
        ("a.jsonl", LINES + b'{"text": "\xff"}\n', r"a.jsonl line 51 is not UTF-8: byte \d+ is 0xff"),
        ("a.jsonl", LINES + b'{"text": "a"\n', "a.jsonl line 51 is not JSON: Expecting"),
        ("a.jsonl", LINES + b'"text"\n', "a.jsonl line 51 is not a JSON object"),
        ("a.jsonl", LINES + b"[" * 100_000 + b"\n", "a.jsonl line 51 is not JSON: maximum recursion"),
        ("a.jsonl", LINES + b'{"text": "\\ud800"}\n', "a.jsonl row 51 holds half a character"),
        ("a.jsonl", LINES + b'{"words": "a"}\n', "a.jsonl row 51: text is None, not text"),
        ("a.json", b'[{"text": "a"}, {"text": ]', "a.json row 2 is not JSON as a list of objects has it: Expecting"),
        ("a.json", b'[{"text": "a"}, 7]', "a.json row 2 is not JSON .* it is a int, not an object"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json row 1 is not JSON .* '{' stands behind it"),
        ("a.json", b'[{"text": "a"}', "a.json row 1 is not JSON .* the list ends behind it"),
        ("a.json", b'[{"text": "a"}] x', "a.json row 1 is not JSON .* something follows the list"),
        ("a.json", b'[{"text": "\xff"}]', "a.json is not UTF-8"),
        ("a.json", b"[]", "a.json is empty|a.json has no rows"),
        ("a.csv", b"text\na\n\xe9\n", "a.csv line 3 is not UTF-8: byte 7 is 0xe9"),
        ("a.csv", b"text,more\na,b\nc\n", "a.csv row 2 has 1 cells, the header 2"),
        ("a.csv", b'text\na\n"never closed\nb\n', "a.csv row 2 is not CSV: unexpected end of data"),
        ("a.csv", b'text\na\n"b"c\n', "a.csv row 2 is not CSV: ',' expected after '\"'"),
        ("a.csv", b"text,text\na,b\n", "a.csv names a column twice"),
        ("a.csv", b"text\n", "a.csv has no rows"),
        ("a.csv", b"\n\n", "a.csv has no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl has no rows"),
        ("a.txt", b" \n\n", "a.txt has no rows"),
        ("a.py", b"a = '\xe9'", "a.py line 1 is not UTF-8: byte 5 is 0xe9"),
        ("a.parquet", parquet([*GOOD, {"text": None}]), "a.parquet row 51: text is None, not text"),
        ("a.arrow", arrow([*GOOD, {"text": ""}]), "a.arrow row 51: text is '', not text"),
    ],
    ids=lambda v: v if isinstance(v, str) and "." in v[:2] else None,
)
def test_bad_rows_are_named(name, content, says, tmp_path):
    refused(tmp_path / name, content, says)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt", "a.jsonl.gz", "a.py"])
def test_a_row_of_ten_million_tokens_is_named(name, tmp_path):
    """40 million characters, against the 10 million of data.max_chars; a row of so many is never in memory twice."""
    row = {"text": "word " * 8_000_000}
    line = json.dumps(row).encode()
    content = {
        "a.jsonl": lambda: LINES + line + b"\n",
        "a.json": lambda: b"[" + line + b"]",
        "a.csv": lambda: b"text\na\n" + row["text"].encode() + b"\n",
        "a.parquet": lambda: parquet([row]),
        "a.arrow": lambda: arrow([row]),
        "a.txt": lambda: row["text"].encode(),
        "a.jsonl.gz": lambda: gzip.compress(line, 1),
        "a.py": lambda: row["text"].encode(),
    }[name]()
    says = r"has 40,000,00\d characters, more than data.max_chars=10000000 allows"
    refused(tmp_path / name, content, says)
    if name in ("a.jsonl", "a.txt"):
        assert len(read(tmp_path / name, max_chars=50_000_000)[-1]["text"]) == 40_000_000


def test_a_line_without_end_is_refused_by_its_size(tmp_path):
    """200 MB on one line of a file with a hole: found by its place, never read."""
    for name, head in (("a.jsonl", b'{"text": "'), ("a.txt", b"a"), ("a.csv", b'text\n"')):
        with open(tmp_path / name, "wb") as file:
            file.write(head)
            file.truncate(200_000_000)
        began, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        says = r"bytes, more than data.max_chars" if name != "a.csv" else "bytes, more than data.max_chars|is not CSV"
        refused(tmp_path / name, None, says)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 250_000 and time.monotonic() - began < 20


# ---- data.bad_rows


def test_skipped_rows_are_counted_by_reason(tmp_path):
    """Seven bad rows of 57, of five kinds; the good ones keep their numbers."""
    bad = [b'{"text": 3}', b'{"text": ""}', b"{", b"[]", b'{"text": "\xff"}', b'{"text": "\\udc00"}',
           json.dumps({"text": "x" * 200}).encode()]  # fmt: skip
    lines = LINES.splitlines()
    for i, line in enumerate(bad):
        lines.insert(3 + 2 * i, line)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = Files(FilesConfig(path=str(tmp_path / "a.jsonl"), validation_share=0.0, bad_rows="skip", max_chars=100))
    assert source.notes == {
        "rows": 50,
        "skipped": {"does not fit the schema": 2, "not JSON": 2, "not UTF-8": 2, "too long": 1},
    }
    assert [source[i]["text"] for i in range(50)] == [r["text"] for r in GOOD]
    assert [source[i]["id"].rpartition(":")[2] for i in range(6)] == ["1", "2", "3", "5", "7", "9"]


@pytest.mark.parametrize(
    ("name", "content", "kept", "skipped"),
    [
        ("a.csv", b'text,n\na,1\nb\n"c"d,2\n"e\nf",3\n"open,4\ng,5\n', ["a", "e\nf", "g"], {"not CSV": 3}),
        ("a.parquet", parquet([*GOOD[:1], {"text": None}, *GOOD[1:2]]), ["row 0", "row 1"], 1),
        ("a.txt", b"a" * 4000 + b"\n\n" + b"\xff" * 4000 + b"\n\nend", ["a" * 4000, "end"], {"not UTF-8": 1}),
    ],
)
def test_skipping_loses_no_good_row(name, content, kept, skipped, tmp_path):
    """An open quote would swallow all rows behind it; only its own is left out."""
    (tmp_path / name).write_bytes(content)
    settings = {"text_column": "text"} if name == "a.csv" else {}
    source = Files(FilesConfig(path=str(tmp_path / name), validation_share=0.0, bad_rows="skip", **settings))
    assert [source[i]["text"] for i in range(len(source))] == kept
    assert source.notes["skipped"] == (skipped if isinstance(skipped, dict) else {"does not fit the schema": skipped})


def test_broken_rows_of_arrow_are_skipped_and_their_neighbours_kept(tmp_path):
    """A byte of one row's text that is no UTF-8."""
    raw = arrow([{"text": f"row {i:04}"} for i in range(50)])
    (tmp_path / "a.arrow").write_bytes(raw.replace(b"row 0031", b"row \xff031"))
    refused(tmp_path / "a.arrow", None, "a.arrow row 32 is broken: .*UTF8")
    source = Files(FilesConfig(path=str(tmp_path / "a.arrow"), validation_share=0.0, bad_rows="skip"))
    assert source.notes == {"rows": 49, "skipped": {"broken": 1}}
    assert source[31]["text"] == "row 0032"


def test_nothing_but_bad_rows_tells_the_first(tmp_path):
    refused(tmp_path / "a.jsonl", b'{"text": 1}\n{"text": 2}\n', "a.jsonl row 1: text is 1", bad_rows="skip")
    refused(tmp_path / "b.jsonl", b"{\n{\n", "b.jsonl line 1 is not JSON", bad_rows="skip")


def test_policy_and_limits_are_checked():
    for wrong, says in (
        ({"bad_rows": "drop"}, "bad_rows='drop' is not one of fail, skip"),
        ({"max_chars": 0}, "max_chars=0 must be greater than 0"),
        ({"columns": ["prompt"]}, "has 'prompt'; write KNOWN=FOUND"),
        ({"text_column": "code", "schema": "pairs"}, "reads one column as text"),
        ({"checker": "regex"}, "checker=regex needs a pattern with a .group."),
        ({"checker": "regex", "pattern": "("}, "is no regular expression"),
        ({"pattern": "(a)"}, "no other checker takes one"),
        ({"max_unpacked_gb": 0.0}, "max_unpacked_gb=0.0 must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            FilesConfig(**wrong)


def test_skipped_rows_are_told_once_and_kept_in_the_manifest(main, pretraining, tmp_path):
    """Through the command line: the counts on the console and in MANIFEST.json, and without skipping one sentence."""
    lines = [json.dumps({"text": f"the heron number {i} stands in the river and waits " * 8}) for i in range(60)]
    lines[7:7], lines[30:30] = ["{"], ['{"text": 1}', '{"text": 2}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    command = pretraining(tmp_path, "a", f"data.path={path}", "trainer.max_steps=1", "model.dim=16")
    done = main(*command)
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert done.err.startswith(f"error: {path} line 8 is not JSON") and "data.bad_rows=skip" in done.err
    done = main(*command, "data.bad_rows=skip", "validation.every_steps=1")
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    for split in ("train", "validation"):
        assert out.count(f"data ({split}): skipped: 2 does not fit the schema, 1 not JSON") == 1, done.out
    found = json.loads((tmp_path / "a/MANIFEST.json").read_text())["read"]
    assert found["train"] == {"rows": 60, "skipped": {"does not fit the schema": 2, "not JSON": 1}}


# ---- broken and hostile archives

PACKERS = {".gz": gzip, ".zst": zstandard, ".bz2": bz2, ".xz": lzma}


def test_cut_and_damaged_archives_are_refused_whole(tmp_path):
    """Cut at every tenth byte, and with one bit changed: never half of the rows."""
    lines = "".join(json.dumps({"text": random.Random(i).randbytes(40).hex()}) + "\n" for i in range(200)).encode()
    for suffix, content in (
        (".gz", gzip.compress(lines)),
        (".zst", zstandard.ZstdCompressor(write_checksum=True).compress(lines)),
        (".bz2", bz2.compress(lines)),
        (".xz", lzma.compress(lines)),
    ):
        path = tmp_path / f"a.jsonl{suffix}"
        for end in range(len(content) // 10, len(content), len(content) // 10):
            refused(path, content[:end], rf"a.jsonl\{suffix} is broken: it cannot be unpacked as \{suffix}")
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 1
        refused(path, bytes(damaged), "is broken")
        refused(path, lines, "is broken")
        refused(path, PACKERS[suffix].compress(b""), "is empty")
    for suffix in (".bz2", ".xz"):
        path = tmp_path / f"a.jsonl{suffix}"
        refused(path, PACKERS[suffix].compress(lines) + b"something else", "is broken")
    assert not list((tmp_path / "cache").rglob("*.tmp-*"))


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_bomb_is_found_in_seconds_and_fills_no_disk(suffix, tmp_path, cache_of_files):
    """10 GB of zeros in 10 MB (gzip), in under 100 kB (zstd), 1.5 MB (xz), and 10 kB (bzip2)."""
    part = PACKERS[suffix].compress(b"\0" * 100_000_000)
    (tmp_path / f"a.txt{suffix}").write_bytes(part * 100)
    began, free = time.monotonic(), shutil.disk_usage(tmp_path).free
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / f"a.txt{suffix}", None, "over 200 times as many: no text does that")
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000
    assert free - shutil.disk_usage(tmp_path).free < 500_000_000 and not list(cache_of_files.rglob("a.txt*"))


@pytest.mark.parametrize("suffix, pieces", [(".bz2", converted._unbz2), (".xz", converted._unxz)])
def test_one_stream_of_a_bomb_is_never_in_memory_whole(suffix, pieces, tmp_path):
    """30 MB of zeros are 4 kB or fewer, so one reading of the file would give them all."""
    (tmp_path / "a").write_bytes(PACKERS[suffix].compress(b"\0" * 30_000_000))
    sizes = [len(piece) for piece, _ in pieces(tmp_path / "a")]
    assert sum(sizes) == 30_000_000 and max(sizes) == converted.PIECE


def test_an_archive_that_asks_for_much_memory_is_refused(tmp_path):
    """A dictionary of 1.5 GB, for one line."""
    big = lzma.compress(LINES, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1_500_000_000}])
    refused(tmp_path / "a.jsonl.xz", big, "cannot be unpacked as .xz .*[Mm]emory")


def test_what_is_unpacked_has_a_limit_in_bytes_and_leaves_room(tmp_path, monkeypatch):
    """70 MB of words that do not repeat; the limit, then a disk that is nearly full."""
    words = b"".join(random.Random(0).randbytes(1 << 20).hex().encode() for _ in range(1)) * 35
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(words, 1))
    refused(path, None, r"a.txt.gz unpacks to more than data.max_unpacked_gb=0.01 GB", max_unpacked_gb=0.01)
    monkeypatch.setattr(converted, "SPARE", 1 << 60)
    refused(path, None, "does not fit unpacked into .*; make room, or set TRIVIUM_CACHE")


def test_broken_parquet_and_arrow_are_named(tmp_path):
    (tmp_path / "empty.parquet").write_bytes(b"")
    for kind, whole in (("parquet", parquet(GOOD)), ("arrow", arrow(GOOD)), ("arrow", arrow(GOOD, pa.ipc.new_stream))):
        for content in (whole[: len(whole) // 2], b"PAR1", b"\0" * 200, whole[:-9] + b"x" * 9):
            path = tmp_path / f"a.{kind}"
            path.write_bytes(content)
            try:
                assert [r["text"] for r in read(path)] == [r["text"] for r in GOOD]  # the end of a stream says nothing
                assert content == whole[:-9] + b"x" * 9
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 400
    refused(tmp_path / "empty.parquet", None, "empty.parquet is empty")


def test_a_page_of_a_parquet_file_that_is_not_what_was_written_is_found(tmp_path):
    """A letter changed within a page, which has a checksum: nothing but that tells."""
    sink = pa.BufferOutputStream()
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.Table.from_pylist(GOOD), sink, write_page_checksum=True, **plain)
    whole = sink.getvalue().to_pybytes()
    path = tmp_path / "a.parquet"
    path.write_bytes(whole)
    assert [r["text"] for r in read(path)] == [r["text"] for r in GOOD]
    path.write_bytes(whole.replace(b"row 17", b"rov 17"))
    says = r"a.parquet row 1 cannot be read: row group 1 of 1 \(rows 1 to 50\) is damaged: .*CRC checksum"
    refused(path, None, says)
    refused(path, None, says, bad_rows="skip")


# ---- damaged parts of files whose numbers of rows are known

TEXTS = [f"row {i:04}" for i in range(500)]


def groups(size=100, **how):
    """TEXTS as Parquet whose pages have checksums."""
    sink, plain = pa.BufferOutputStream(), {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": TEXTS}), sink, row_group_size=size, write_page_checksum=True, **plain, **how)
    return sink.getvalue().to_pybytes()


def batches(new, texts=None):
    """TEXTS as Arrow, compressed, in batches of 100."""
    table, sink = pa.table({"text": texts or TEXTS}), pa.BufferOutputStream()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table, max_chunksize=100)
    return sink.getvalue().to_pybytes()


def messages(content):
    """What an Arrow file or stream holds, the schema first."""
    return list(pa.ipc.MessageReader.open_stream(pa.py_buffer(content).slice(8 * content.startswith(b"ARROW1"))))


def flipped(content, *rows):
    """A letter of each of these rows is another."""
    for row in rows:
        assert content.count(TEXTS[row].encode()) == 1
        content = content.replace(TEXTS[row].encode(), TEXTS[row].replace("r", "R").encode())
    return content


def torn(content, *numbers):
    """The last 200 bytes of each of these messages behind the schema are inverted: of a batch, its text."""
    for number in numbers:
        body = messages(content)[1 + number].body.to_pybytes()
        assert content.count(body) == 1
        content = content.replace(body, body[:-200] + bytes(255 - b for b in body[-200:]))
    return content


def skipping(path):
    return Files(FilesConfig(path=str(path), validation_share=0.0, bad_rows="skip"))


def without(path, *lost):
    """The examples of TEXTS but for those in the ranges `lost`, under their own numbers."""
    gone = {row for rows in lost for row in rows}
    return [{"id": f"{path}:{i + 1}", "text": text} for i, text in enumerate(TEXTS) if i not in gone]


DAMAGED = {
    "a.parquet": ("row group", groups, lambda whole: flipped(whole, 250)),
    "file.arrow": ("record batch", lambda: batches(pa.ipc.new_file), lambda whole: torn(whole, 2)),
    "stream.arrow": ("record batch", lambda: batches(pa.ipc.new_stream), lambda whole: torn(whole, 2)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_part_is_named_or_skipped_with_all_its_rows(name, tmp_path):
    """The third of five parts of 100 rows; the rows behind it keep their numbers. Again from the cache."""
    kind, make, damage = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(make())
    whole = skipping(path)
    assert whole.notes == {"rows": 500} and [whole[i] for i in range(500)] == without(path)
    path.write_bytes(damage(make()))
    for _ in range(2):
        refused(
            path, None, rf"{name} row 201 cannot be read: {kind} 3 of 5 \(rows 201 to 300\) is damaged: .*skip leaves"
        )
        source = skipping(path)
        assert len(source) == 400 and source.notes == {
            "rows": 400,
            "skipped": {f"in a damaged {kind}": 100},
            "lost": {f"in {kind} 3 of 5 of {path} (rows 201 to 300)": 100},
        }
        assert [source[i] for i in range(400)] == without(path, range(200, 300))
    assert source.fingerprint != whole.fingerprint
    orders = [Order(len(s), 0, s.fingerprint).rows(0, 400) for s in (source, whole)]
    assert [source[i]["id"] for i in orders[0]] != [whole[i]["id"] for i in orders[1]]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_parts_side_by_side_at_the_start_and_at_the_end(name, tmp_path):
    kind, make, _ = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(flipped(make(), 0, 199, 400) if kind == "row group" else torn(make(), 0, 1, 4))
    source = skipping(path)
    assert source.notes["skipped"] == {f"in a damaged {kind}": 300} and len(source.notes["lost"]) == 3
    assert [source[i] for i in range(len(source))] == without(path, range(200), range(400, 500))


def test_of_a_damaged_row_group_no_row_is_kept(tmp_path, monkeypatch):
    """Its first rows can be read, and were written already when the damage in its last page was found."""
    monkeypatch.setattr(arrow_files, "RESIDENT", 1000)
    path = tmp_path / "a.parquet"
    path.write_bytes(flipped(groups(200, data_page_size=100, write_batch_size=10), 399))
    source = skipping(path)
    assert source.notes["skipped"] == {"in a damaged row group": 200}
    assert [source[i] for i in range(len(source))] == without(path, range(200, 400))


def test_what_a_file_says_itself_of_lost_rows_is_not_believed(tmp_path):
    table = pa.table({"text": TEXTS}).replace_schema_metadata(
        {arrow_files.LOST: '[[0, 9, "a", "b", "c"], [700, 1, 2]]'}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == without(tmp_path / "a.parquet")


def test_a_file_of_nothing_but_damaged_parts_is_counted_among_others(tmp_path):
    (tmp_path / "a.parquet").write_bytes(flipped(groups(), 0, 100, 200, 300, 400))
    (tmp_path / "b.jsonl").write_bytes(LINES)
    source = skipping(tmp_path)
    assert len(source) == source.notes["rows"] == 50 and source.notes["skipped"] == {"in a damaged row group": 500}
    refused(tmp_path / "a.parquet", None, "a.parquet row 1 cannot be read: row group 1 of 5", bad_rows="skip")


def one_fewer(content):
    """The footer says of all rows, 500 as a field of Thrift, that they are 499."""
    assert content.count(b"\x16\xe8\x07") == 1
    return content.replace(b"\x16\xe8\x07", b"\x16\xe6\x07")


def twice(content):
    """A batch says of its column that it has one row less."""
    metadata = messages(content)[3].metadata.to_pybytes()
    at = metadata.rindex(struct.pack("<q", 100))
    return content.replace(metadata, metadata[:at] + struct.pack("<q", 99) + metadata[at + 8 :], 1)


def coded(content):
    """The same with a dictionary of its texts for each batch."""
    sink, schema = pa.BufferOutputStream(), pa.schema([("text", pa.dictionary(pa.int32(), pa.string()))])
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for batch in pa.ipc.open_stream(content):
            coded = batch.column(0).dictionary_encode()
            writer.write_batch(pa.record_batch([coded], schema=schema))
    content = sink.getvalue().to_pybytes()
    assert [m.type for m in messages(content)].count("dictionary") == 5
    return content


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("a.parquet", one_fewer, "row groups of 500 rows are said to be 499"),
        ("a.parquet", lambda c: one_fewer(flipped(c, 250)), "row groups of 500 rows are said to be 499"),
        ("a.parquet", lambda c: c[:-9] + b"x" * 9, "cannot be read as parquet"),
        ("a.parquet", lambda c: c[:-1], "cannot be read as parquet"),
        ("file.arrow", lambda c: torn(c, 2)[:-1], "cannot be read as arrow"),
        ("file.arrow", twice, "cannot be read as arrow: Array length did not match record batch length"),
        ("stream.arrow", twice, "cannot be read as arrow: Array length did not match record batch length"),
        ("stream.arrow", lambda c: torn(c, 2)[:-500], "cannot be read as arrow: Expected to be able to read"),
        ("stream.arrow", lambda c: torn(coded(c), 4), "as arrow: it is damaged, and what its dictionaries say"),
    ],
)  # fmt: skip
def test_what_nobody_can_count_is_refused_by_both_policies(name, damage, says, bad_rows, tmp_path):
    content = DAMAGED[name][1]()
    assert damage(content) != content
    refused(tmp_path / name, damage(content), says, bad_rows=bad_rows)


def test_a_source_that_has_skipped_rows_travels_to_other_processes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"{\n")
    source = skipping(tmp_path / "a.jsonl")
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(50)] == [source[i] for i in range(50)] and again.notes == source.notes


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_flipped_bits_never_end_the_process(kind, tmp_path):
    """120 damaged files: each is refused, or read as what its bytes now say."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(90)
    ]
    new = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}
    whole = parquet(rows) if kind == "parquet" else arrow(rows, new[kind])
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    refusals = 0
    for seed in range(120):
        draw, content = random.Random(seed), bytearray(whole)
        for _ in range(draw.choice((1, 1, 4))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            read(path, bad_rows="skip")
        except DataError as error:
            refusals += 1
            assert "\n" not in str(error)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert 20 < refusals < 120
