"""Conversations that outlive the process: branches, one writer, what a kill leaves, and damage that is found."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from trivium.errors import CheckpointError, SessionError
from trivium.inference.sessions import RESPONSE, NewTurn, SessionStore, new_session


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    made = SessionStore(tmp_path / "s.sqlite" if request.param == "file" else None)
    yield made
    made.close()


def user(text, ids=(1, 2)):
    return NewTurn("user", text, ids)


def said(text, ids=(3, 4), **how):
    return NewTurn("assistant", text, ids, **how)


def texts(path):
    return [turn.text for turn in path]


def test_turns_come_back_as_they_were_kept(store):
    session = new_session("m", "t", system="be kind", sampling={"temperature": 0.5}, title="")
    asked, answers = store.append(
        session.id, None, [user("  a\nb ", (0, 70_000, 2**32 - 1))], [said("é😀", (5,))], session
    )
    found = store.get(session.id)
    assert (found.model, found.template, found.system) == ("m", "t", "be kind")
    assert found.sampling == {"temperature": 0.5}
    assert (found.title, found.head) == ("a b", answers[0].id)
    assert store.path(found.head) == [*asked, *answers] == store.turns(session.id)
    assert [t.ids for t in store.path(found.head)] == [(0, 70_000, 2**32 - 1), (5,)]
    assert store.turn(asked[0].id).text == "  a\nb "


def test_an_answer_beside_another_and_an_edited_question_are_branches(store):
    """q1 -> {a1, a1'}; a1' -> q2 -> a2; and q1' beside q1. Five paths, nothing lost."""
    session = store.create(new_session("m", "t"))
    one = store.append(session.id, None, [user("q1")], [said("a1")])
    again = store.append(session.id, None, [user("q1")], [said("a1'", (9,))])
    assert again.asked == one.asked, "a question that is asked again is one turn"
    assert texts(store.path(store.get(session.id).head)) == ["q1", "a1'"]
    two = store.append(session.id, again.answers[0].id, [user("q2")], [said("a2"), said("b2", (7,))])
    assert store.get(session.id).head == two.answers[0].id
    other = store.append(session.id, None, [user("q1 edited")], [said("a3")])
    assert texts(store.turns(session.id)) == ["q1", "a1", "a1'", "q2", "a2", "b2", "q1 edited", "a3"]
    assert texts(store.path(two.answers[1].id)) == ["q1", "a1'", "q2", "b2"]
    assert texts(store.path(other.answers[0].id)) == ["q1 edited", "a3"]
    store.move(session.id, one.answers[0].id)
    assert texts(store.path(store.get(session.id).head)) == ["q1", "a1"]
    store.append(session.id, None, [user("q1", (1, 3))], [said("a4")])  # the same words as other ids are another turn
    assert texts(store.turns(session.id)).count("q1") == 2


def test_what_is_not_there_is_told(store):
    session = store.create(new_session("m", "t"))
    mine = store.append(session.id, None, [user("q")], [said("a", id="resp-1")])
    other = store.create(new_session("m", "t"))
    for act in (
        lambda: store.get("x"), lambda: store.find("x"), lambda: store.turn("x"), lambda: store.path("x"),
        lambda: store.append(other.id, mine.answers[0].id, [user("q")]), lambda: store.append("x", None, [user("q")]),
        lambda: store.move(other.id, "resp-1"), lambda: store.delete("x"),
    ):  # fmt: skip
        with pytest.raises(SessionError) as told:
            act()
        assert told.value.reason == "missing" and "\n" not in str(told.value)
    with pytest.raises(SessionError, match="there is a turn 'resp-1' already"):
        store.append(session.id, None, [user("other")], [said("a", id="resp-1")])
    assert len(store.turns(session.id)) == 2 and store.turns(other.id) == []
    assert store.path(None) == []


def test_sessions_are_found_by_name_listed_and_deleted(store):
    first = store.create(new_session("m", "t", title="trip"))
    second = store.create(new_session("m", "t", title="trip"))
    store.append(first.id, None, [user("q")], [said("a")])
    assert store.find("trip").id == first.id, "the newest of that name"
    assert store.find(second.id).id == second.id
    assert [s.id for s in store.sessions()] == [first.id, second.id]
    assert [s.id for s in store.sessions(1)] == [first.id]
    assert store.update(first.id, title="else").title == "else"
    store.delete(first.id)
    assert [s.id for s in store.sessions()] == [second.id] and store.turns(first.id) == []


def test_half_a_character_becomes_a_question_mark(store):
    """JSON can bring a lone surrogate, which no file can hold."""
    session = store.create(new_session("m", "t"))
    store.append(session.id, None, [user("a\ud800b\0c")])
    assert texts(store.turns(session.id)) == ["a?b\0c"]
    for ask in (store.get, store.find, store.turn, store.response, lambda half: store.move(session.id, half)):
        with pytest.raises(SessionError, match="holds half a character") as told:
            ask("a\ud800")
        assert told.value.status == 400


def test_a_conversation_with_another_model_or_template_is_refused(store):
    session = store.create(new_session("m", "t", title="trip"))
    store.check(session, "m", "t")
    for model, template, what in (
        ("n", "t", "er model,"),
        ("m", "u", "er template,"),
        ("n", "u", "model and template,"),
    ):
        with pytest.raises(SessionError, match=what) as told:
            store.check(session, model, template)
        assert told.value.reason == "foreign"


def test_a_second_writer_is_refused_and_the_other_conversation_is_not(store):
    store.create(one := new_session("m", "t"))
    with store.writing(one.id):
        with pytest.raises(SessionError, match=f"conversation '{one.id}' is being written by process {os.getpid()}"):
            store.delete(one.id)
        with store.writing("another"):
            pass
    store.delete(one.id)


def test_a_second_writer_in_another_process_is_refused_until_the_first_dies(tmp_path):
    program = """
        import sys, time
        from pathlib import Path
        from trivium.inference.sessions import SessionStore
        with SessionStore(Path(sys.argv[1])).writing("one"):
            print("held", flush=True)
            time.sleep(600)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), tmp_path / "s"], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"held\n"
        store = SessionStore(tmp_path / "s")
        with pytest.raises(SessionError, match=f"is being written by process {child.pid}; wait for it") as told:
            with store.writing("one"):
                pass
        assert told.value.reason == "busy"
        with store.writing("two"):
            pass
    finally:
        child.kill()
        child.communicate()
    with store.writing("one"):
        pass


def test_a_transaction_that_fails_keeps_nothing(store):
    """The second answer has an id that is taken: neither the question nor the first answer is kept."""
    session = store.create(new_session("m", "t"))
    kept = store.append(session.id, None, [user("q")], [said("a", id="x")])
    with pytest.raises(SessionError):
        store.append(session.id, "x", [user("q2")], [said("new"), said("taken", id="x")])
    assert texts(store.turns(session.id)) == ["q", "a"]
    assert store.get(session.id).head == kept.answers[0].id


WRITER = """
    import sys
    from pathlib import Path
    from trivium.inference.sessions import NewTurn, SessionStore, new_session
    store = SessionStore(Path(sys.argv[1]))
    session, parent, number = new_session("m", "t"), None, 0
    while True:
        asked, answers = store.append(session.id, parent, [NewTurn("user", f"q{number}", [number] * 50)],
                                      [NewTurn("assistant", f"a{number}", [number] * 500)], session)
        parent, number = answers[0].id, number + 1
        print(number, flush=True)
"""


@pytest.mark.parametrize("turns", [1, 7, 30])
def test_kill_leaves_whole_turns_and_every_one_that_was_acknowledged(tmp_path, turns):
    """A process that does nothing but append is killed at some moment after its n-th turn."""
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), tmp_path / "s"], stdout=subprocess.PIPE)
    while int(child.stdout.readline()) < turns:
        pass
    child.send_signal(signal.SIGKILL)
    told = [turns, *map(int, child.communicate()[0].split())][-1]
    assert child.returncode == -signal.SIGKILL
    store = SessionStore(tmp_path / "s")
    (session,) = store.sessions()
    path = store.path(session.head)
    assert len(path) in (2 * told, 2 * told + 2), "all it told of, and at most one that it could not tell of any more"
    for number, (asked, answer) in enumerate(zip(path[::2], path[1::2], strict=True)):
        assert (asked.text, answer.text) == (f"q{number}", f"a{number}")
        assert (asked.ids, answer.ids) == ((number,) * 50, (number,) * 500)
    assert store.turns(session.id) == path


def test_threads_and_processes_append_side_by_side(tmp_path):
    """Two stores of one file, four threads each, each with a conversation of its own: every turn is there."""
    stores = [SessionStore(tmp_path / "s") for _ in range(2)]
    sessions = [new_session("m", "t") for _ in range(8)]

    def write(store, session):
        parent = None
        for number in range(10):
            parent = store.append(session.id, parent, [user(f"{number}")], [said("a")], session).answers[0].id

    threads = [threading.Thread(target=write, args=(stores[i % 2], s)) for i, s in enumerate(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        assert texts(stores[0].path(stores[1].get(session.id).head))[::2] == [str(n) for n in range(10)]


def test_a_changed_byte_in_a_turn_is_found(tmp_path):
    """Not in the last turn only: each turn's digest covers those before it."""
    store = SessionStore(tmp_path / "s")
    session = store.create(new_session("m", "t"))
    first = store.append(session.id, None, [user("q")], [said("a", (3, 4))])
    last = store.append(session.id, first.answers[0].id, [user("q2")], [said("a2")])
    changed = np.asarray([3, 5], "<u4").tobytes()
    with sqlite3.connect(tmp_path / "s") as other:
        other.execute("UPDATE turns SET ids = ? WHERE id = ?", (changed, first.answers[0].id))
    other.close()
    with pytest.raises(CheckpointError, match=f"turn {first.answers[0].id} is not what was written"):
        store.path(last.answers[0].id)
    with sqlite3.connect(tmp_path / "s") as other:
        other.execute("DELETE FROM turns WHERE id = ?", (first.answers[0].id,))
    other.close()
    with pytest.raises(CheckpointError, match="is damaged"):
        store.path(last.answers[0].id)


def test_what_is_no_store_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "text").write_text("hello, this is no database at all" * 100)
    with sqlite3.connect(tmp_path / "foreign") as other:
        other.execute("CREATE TABLE turns (id TEXT)")
    other.close()
    SessionStore(tmp_path / "later").close()
    with sqlite3.connect(tmp_path / "later") as other:
        other.execute("PRAGMA user_version = 7")
    other.close()
    for name, what in (
        ("text", "cannot be used (file is not a database)"), ("foreign", "is a database of another program"),
        ("later", "is of version 7, this program reads version 2"), (".", "cannot be used"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError) as told:
            SessionStore(tmp_path / name)
        assert what in str(told.value) and "\n" not in str(told.value)
    assert (tmp_path / "text").read_text().startswith("hello")


def test_a_full_disk_keeps_what_was_there(tmp_path):
    """SQLite's own limit on pages stands for a disk that is full."""
    store = SessionStore(tmp_path / "s")
    session = store.create(new_session("m", "t"))
    kept = store.append(session.id, None, [user("q")], [said("a")])
    store._db.connection.execute(
        f"PRAGMA max_page_count = {store._db.connection.execute('PRAGMA page_count').fetchone()[0] + 2}"
    )
    with pytest.raises(CheckpointError, match="database or disk is full"):
        store.append(session.id, kept.answers[0].id, [user("q2")], [said("long", [1] * 100_000)])
    assert texts(store.path(store.get(session.id).head)) == ["q", "a"]
    store.append(session.id, kept.answers[0].id, [user("q2")], [said("a2")])


def test_the_file_is_synced_at_every_turn(tmp_path):
    store = SessionStore(tmp_path / "s")
    assert store._db.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._db.connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_many_processes_may_make_the_file_at_once(tmp_path):
    program = "import sys; from pathlib import Path; from trivium.inference.sessions import *; " \
              "s = SessionStore(Path(sys.argv[1])); s.create(new_session('m', 't'))"  # fmt: skip
    children = [subprocess.Popen([sys.executable, "-c", program, tmp_path / "s"]) for _ in range(4)]
    assert [child.wait(timeout=120) for child in children] == [0] * 4
    assert len(SessionStore(tmp_path / "s").sessions()) == 4


# ---- responses


def respond(store, id, parent=None, word="a"):
    """A response that is kept, in a conversation of its own or behind another."""
    session = new_session("m", "t", kind=RESPONSE) if parent is None else store.get(store.turn(parent).session)
    store.append(session.id, parent, [user(f"q {word}")], [said(f"a {word}", id=id, body={"told": word})], session)


def test_what_is_forgotten_for_its_age_is_in_no_file(tmp_path):
    """Nor in the log of changes beside it; what is kept is."""
    store = SessionStore(tmp_path / "s.sqlite")
    for number in range(3):
        respond(store, f"r{number}", word=f"secret{number}")
    store.keep_newest(3, "")
    written = b"".join(file.read_bytes() for file in tmp_path.glob("s.sqlite*") if file.is_file())
    assert b"secret0" in written
    store.keep_newest(1, "")
    left = b"".join(file.read_bytes() for file in tmp_path.glob("s.sqlite*") if file.is_file())
    assert [word in left for word in (b"secret0", b"secret1", b"secret2")] == [False, False, True]


def test_threads_that_forget_the_oldest_responses_at_once_do_not_fail(store):
    """Each keeps a response and then forgets all but the newest 5, as a server does after every answer."""
    failed, together = [], threading.Barrier(8)

    def work(thread):
        together.wait()
        for number in range(20):
            respond(store, f"{thread}-{number}")
            try:
                store.keep_newest(5, "")
            except SessionError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert store._db.rows("SELECT count(*) FROM responses") == [(5,)]
    assert store._db.rows("SELECT count(*) FROM turns") == [(10,)]
    with store._db.transaction() as db:
        store._forget(db, "0-0")  # one that another forgot already
