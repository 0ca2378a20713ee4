"""A transaction that fails, a file that moves, at the very instant where it hurts."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from barnabas import App
from barnabas.backends.host import Life
from barnabas.errors import BackendError, BufferFull
from barnabas.message import OutgoingJob
from barnabas.ports import Result


class Listener:
    """It counts."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def assigned(self, parts: list) -> None:
        self.parts += parts

    def revoked(self, parts: list) -> None:
        self.parts = [part for part in self.parts if part not in parts]


def make(path: Path) -> App:
    return App("faults", events=f"sqlite:///{path}", jobs=f"sqlite:///{path}", send_timeout=1.0)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    app = make(tmp_path / "a.db")
    yield app
    app.close()


def stored(app: App, name: str) -> int:
    return sum(high - low for state in app.events.topics() if state.name == name for low, high, _ in state.partitions)


def test_what_a_failed_transaction_made_is_forgotten(app: App) -> None:
    """Or numbers that nobody has would be used, or by two."""
    events: Any = app.events
    topic, job = app.topic("fresh", int), app.job(lambda n: None, name="work", queue="fresh")

    def store(table: str, fails: bool) -> None:
        def act(db: Any) -> None:
            outputs = [(topic, None, None, b"1", None, 1.0, None), OutgoingJob("fresh", b"{}", None, "1", None)] if fails else []
            events.store(db, outputs, {(table, "k"): table.encode()})
            if fails:
                raise OSError(28, "No space left on device")

        events.write(act)

    with pytest.raises(BackendError, match="the disk is full"):
        store("one", fails=True)
    store("other", fails=False)
    store("one", fails=False)
    assert (events.cell("one", "k"), events.cell("other", "k")) == (b"one", b"other")
    topic.send(1).result(5)
    job.enqueue(1).result(5)
    assert stored(app, "fresh") == 1


def test_what_a_failed_transaction_claimed_is_not_held(app: App) -> None:
    events: Any = app.events
    app.job(lambda n: None, name="work").enqueue_many((n,) for n in range(30)).result(5)
    topic, listener = app.topic("t", int), Listener()
    jobs = events.queues(["default"], listener)
    log = events.log("g", [topic], start="earliest", ordered=True, listener=listener)
    fails = True
    events.file.writer.set_commit_hook(lambda: fails)
    for _ in range(3):
        with pytest.raises(BackendError):
            jobs.fetch(10, 0.0)
        with pytest.raises(BackendError):
            log.fetch(10, 0.0)
    assert len(listener.parts) == 1  # the queue
    fails = False
    taken = set()
    for fail in (False, True, False, False):
        [(part, rows)] = jobs.fetch(10, 0.0) or [(None, ())]
        taken |= {row[0] for row in rows}
        if not rows:
            continue
        if fail:
            fails = True
            with pytest.raises(BackendError):
                jobs.settle([Result(part, rows, [], {}, {})])
            fails = False
        jobs.settle([Result(part, rows, [], {}, {})])
    assert len(taken) == 30 and not events.query("SELECT 1 FROM jobs")
    log.fetch(10, 0.0)
    assert len(listener.parts) == 7 and {at.owner for at in events.positions()} == {events.name}
    jobs.close(), log.close()


@pytest.mark.parametrize("ends", ["back", "another"])
def test_a_file_that_is_moved_away_during_a_commit(app: App, tmp_path: Path, ends: str) -> None:
    """Nobody is told that it is stored, until the file is back and has it once; or another has it."""
    topic, events, path = app.topic("t", int), app.events, tmp_path / "a.db"
    topic.send(0).result(5)
    events.file.writer.set_commit_hook(lambda: path.exists() and os.rename(path, tmp_path / "away"))  # type: ignore[attr-defined]
    future = topic.send(1)
    with pytest.raises(TimeoutError):
        future.result(0.7)
    if ends == "back":
        events.file.writer.set_commit_hook(None)  # type: ignore[attr-defined]
        os.rename(tmp_path / "away", path)
    else:
        other = make(tmp_path / "b.db")
        other.events.declare([other.topic("t", int)])
        other.close()
        os.rename(tmp_path / "b.db", path)
    future.result(5)
    app.close()
    again = make(path)
    again.topic("t", int)
    assert stored(again, "t") == (2 if ends == "back" else 1)
    again.close()


def test_what_is_left_at_the_end_has_failed(app: App, tmp_path: Path, caplog: Any) -> None:
    """A future that nobody resolves any more would be waited for forever. It is said once, not once for each."""
    topic = app.topic("t", int)
    topic.send(0).result(5)
    os.rename(tmp_path / "a.db", tmp_path / "away")
    futures = [topic.send(n) for n in range(5)]
    app.close()
    assert "5 messages could not be stored before the end" in caplog.text and "nobody looked" not in caplog.text
    for future in futures[:4]:
        assert "was closed before" in str(future.exception(0))
    del futures, future
    assert "nobody looked" not in caplog.text


def test_what_a_full_buffer_refuses_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice would take twice as long, and could store it twice."""
    url = f"sqlite:///{tmp_path}/a.db"
    app = App("a", events=url, jobs=url, buffer_messages=10, send_timeout=0.2)
    topic, tries = app.topic("t", int), list[int]()
    topic.send(0).result(5)
    os.rename(tmp_path / "a.db", tmp_path / "away")
    topic.send(1)
    send = app.events.send
    monkeypatch.setattr(app.events, "send", lambda out: tries.append(len(out)) or send(out))  # type: ignore[func-returns-value]
    with pytest.raises(BufferFull, match=r"was full for 0\.2 s"):
        topic.send_many(range(3000))
    assert tries == [2000]
    app.close()


def test_a_bell_that_cannot_be_rung_fails_no_commit(app: App) -> None:
    """What is committed is, and the others look once a second."""
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, app.events.file.bell._fd)  # type: ignore[attr-defined]
    os.close(full)
    assert app.events.write(lambda db: 5) == 5  # type: ignore[attr-defined]


def test_the_sign_of_life_of_another_is_left(tmp_path: Path) -> None:
    """Where the file was replaced, the numbers of processes begin anew."""
    one = Life(f"{tmp_path}/a.db", 1)
    os.unlink(one.path)
    other = Life(f"{tmp_path}/a.db", 1)
    one.close()
    assert os.path.exists(other.path)
    other.close()
    assert not os.path.exists(other.path)
