"""Damaged tokenizer files: each of 4,000 is refused with DataError or is a sound tokenizer, soon and in little memory.

What a process cannot survive (a crash, a memory limit) is looked for in a process of its own.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trivium.data.config import BPEConfig
from trivium.data.tokenizer import Tokenizer, train_bpe
from trivium.errors import DataError

NUMBER = 2000
HUGE = (0, -1, 2**31, 2**32, 2**63, 2**64, 10**30, 1e308, -1e308, 0.5, float("nan"), float("inf"))
TYPES = (None, True, False, "", "a", "\ud800", [], {}, [[]], [None], {"type": "BPE"}, {"content": 1}, "x" * 10_000)


def places(tree, path=()):
    """Every place in a JSON tree, as a list of keys."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def replaced(tree, path, value):
    """A copy with another value at one place. Not given: the place is gone."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) == 1 and value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


def mutation(content, draw):
    """One damaged copy of a JSON file, as bytes."""
    kind = draw.choice(("flip", "cut", "type", "number", "gone", "deep", "twice", "text"))
    if kind == "flip":
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged)
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "deep":
        depth = draw.choice((100, 1000, 100_000))
        middle, (opens, closes) = draw.randrange(len(content)), draw.choice((("[", "]"), ('{"a":', "}")))
        return content[:middle] + (opens * depth + closes * depth).encode() + content[middle:]
    tree = json.loads(content)
    # a place at random would almost always be a word of the vocabulary: choose among the parts evenly
    within = [p for p in places(tree) if p and (len(p) < 4 or draw.random() < 0.02)]
    path = draw.choice(within)
    if kind == "text":
        value = draw.choice(("(", "(a+)+$", "[", "(?<!", "\\p{L", "\x00", "{% for %}", "{{ 1/0 }}", "(?:" * 500))
        texts = [p for p in within if isinstance(at(tree, p), str)]
        path = draw.choice(texts or within)
    else:
        value = {"type": lambda: draw.choice(TYPES), "number": lambda: draw.choice(HUGE), "gone": lambda: ...,
                 "twice": lambda: [at(tree, path)] * 2}[kind]()  # fmt: skip
    return json.dumps(replaced(tree, path, value)).encode()


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def load_damaged(folder, file, seed, number):
    """Load `number` damaged copies of folder/file; returns how many were sound."""
    content, draw = (folder / file).read_bytes(), random.Random(seed)
    sound = 0
    for _ in range(number):
        (folder / file).write_bytes(mutation(content, draw))
        started = time.process_time()
        try:
            tokenizer = Tokenizer.load(folder)
        except DataError as error:
            assert len(str(error)) < 1000
        else:
            ids = tokenizer.encode("the cat 12 <|end|> \U0001f600")
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert isinstance(tokenizer.decode(ids), str)
            assert all(0 <= i < tokenizer.vocab_size for i in (*tokenizer.stop_ids, *tokenizer.start, tokenizer.pad_id))
            sound += 1
        assert time.process_time() - started < 1
    return sound


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_refused_or_sound(tmp_path, file):
    """2,000 each: flipped bits, cuts, other types, numbers out of range, missing and doubled parts, nesting."""
    train_bpe(BPEConfig(vocab_size=300), ["the cat sat on the mat"]).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config["added_tokens_decoder"] = {str(i): {"content": t, **flags} for i, t in enumerate(("<|pad|>", "<|bos|>"))}
    config["eos_token"] = {"content": "<|eos|>", **flags}
    config |= {"stop_tokens": ["<|user|>"], "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, __file__, tmp_path, file, str(NUMBER)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    sound, megabytes, seconds = map(float, run.stdout.split()[-3:])
    assert 0 < sound < NUMBER
    assert megabytes < 200 and seconds < 20


if __name__ == "__main__":
    where, what, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    Tokenizer.load(where)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = load_damaged(where, what, 0, count)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(found, grown, time.perf_counter() - began)
