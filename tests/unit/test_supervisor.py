"""The supervisor's decisions, with processes and a clock that are not real."""

import logging
import signal
import socket
from collections.abc import Iterator

import pytest

from barnabas.clock import FakeClock
from barnabas.supervisor import BACKOFF, LIVES, STEADY, Lifeline, Supervisor, outcome_of
from barnabas.worker import RECYCLE

KILLED = -signal.SIGKILL


class FakeProcess:
    """A process that ends when the test says so."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, sig: int) -> None:
        self.signals.append(sig)


class House:
    """A supervisor and its processes, in the order of their starts."""

    def __init__(self, count: int, **options: object) -> None:
        self.clock = FakeClock()
        self.started: list[tuple[int, FakeProcess]] = []
        self.lines: list[socket.socket] = []
        self.supervisor = Supervisor(self.spawn, count, monotonic=self.clock.monotonic, **options)  # type: ignore[arg-type]
        self.supervisor.step()

    def spawn(self, number: int) -> tuple[FakeProcess, socket.socket]:
        process = FakeProcess(100 + len(self.started))
        self.started.append((number, process))
        ours, theirs = socket.socketpair()
        self.lines.append(theirs)
        return process, ours

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.started]

    def step(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.supervisor.step()

    def say(self, line: str, index: int = -1) -> None:
        """The child of this start says something."""
        number, process = self.started[index]
        child = self.supervisor.children[number - 1]
        assert child.process is process
        self.supervisor.heard(child, line)

    def end(self, code: int, index: int = -1, seconds: float = 0.0) -> None:
        """The process of this start ends."""
        self.started[index][1].code = code
        self.step(seconds)


@pytest.fixture
def house() -> Iterator[object]:
    houses: list[House] = []

    def build(count: int = 1, **options: object) -> House:
        houses.append(House(count, **options))
        return houses[-1]

    yield build
    for each in houses:
        for line in each.lines:
            line.close()
        each.supervisor.close()


def test_all_are_started(house):
    assert house(3).numbers == [1, 2, 3]


def test_a_crashed_child_is_started_again_after_a_growing_wait(house, caplog):
    h = house()
    caplog.set_level(logging.INFO, "barnabas")
    for wait in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0):
        h.say("ready")
        h.end(KILLED, seconds=2.0)
        h.step(wait - 0.01)
        before = len(h.started)
        h.step(0.02)
        assert len(h.started) == before + 1, wait
    assert BACKOFF == (0.1, 30.0)
    assert "process 1 (pid 100) ended with SIGKILL after 2.0 s; starting it again in 0.1 s" in caplog.text
    assert len(caplog.records) == 2 * 11 - 1  # one line a change


def test_a_steady_life_makes_crashes_forgotten(house):
    h = house()
    for _ in range(4):
        h.say("ready")
        h.end(KILLED, seconds=2.0)
        h.step(BACKOFF[1])
    h.say("ready")
    h.end(KILLED, seconds=STEADY)
    before = len(h.started)
    h.step(0.11)
    assert len(h.started) == before + 1


@pytest.mark.parametrize("code", [1, KILLED])
def test_children_that_cannot_start_end_it(house, code):
    h = house(2)
    h.say("ready", 1)
    for _ in range(LIVES - 1):
        h.end(code, 0 if len(h.started) == 2 else -1)
        assert not h.supervisor.stopping
        h.step(1.7)
    h.end(code)
    assert h.supervisor.stopping
    assert h.started[1][1].signals == [signal.SIGTERM]
    h.end(0, 1)
    assert not h.supervisor.alive()
    assert h.supervisor.status == 1


def test_a_child_that_could_start_once_is_tried_for_ever(house):
    """The disk is full, a broker is away: the others wait for it to come back, too."""
    h = house(2)
    h.say("ready", 0)
    h.end(KILLED, 0)
    for _ in range(3 * LIVES):
        h.step(BACKOFF[1] + 1)
        h.end(1)
    assert not h.supervisor.stopping
    h.step(BACKOFF[1] + 1)
    h.say("ready")
    assert h.supervisor.alive()


def test_children_that_fail_as_soon_as_they_are_ready_end_it(house):
    h = house()
    for _ in range(LIVES):
        assert not h.supervisor.stopping
        h.say("ready")
        h.say("failed")
        h.end(1)
        h.step(1.7)
    assert not h.supervisor.alive()
    assert h.supervisor.status == 1


@pytest.mark.parametrize("code", [KILLED, 1, 3])
def test_children_that_die_of_their_messages_go_on(house, code):
    """A message that kills its process needs four crashes to be dead, and there may be many such."""
    h = house()
    for _ in range(4 * LIVES):
        h.say("ready")
        h.end(code)
        h.step(BACKOFF[1])
    assert h.supervisor.alive()
    assert not h.supervisor.stopping


def test_a_child_that_makes_way_is_replaced_at_once(house):
    h = house()
    for _ in range(2 * LIVES):
        h.say("ready")
        before = len(h.started)
        h.end(RECYCLE)
        assert len(h.started) == before + 1


def test_children_make_way_one_at_a_time(house):
    h = house(3)
    for index in range(3):
        h.say("ready", index)
    for index in range(2):
        h.say("recycle", index)
    h.step()
    first, second = h.lines[:2]
    second.setblocking(False)
    assert first.recv(100) == b"recycle\n"
    h.end(RECYCLE, 0)
    with pytest.raises(BlockingIOError):
        second.recv(100)
    h.say("ready")  # the one after the first
    h.step()
    assert second.recv(100) == b"recycle\n"


@pytest.mark.parametrize("code", [KILLED, 0])
def test_a_turn_ends_also_otherwise(house, code):
    h = house(2)
    for index in range(2):
        h.say("ready", index)
        h.say("recycle", index)
    h.step()
    if code == 0:
        h.say("drained", 0)
    h.end(code, 0)
    h.step()
    assert h.lines[1].recv(100) == b"recycle\n"


def test_drained_children_are_not_started_again(house):
    h = house(2)
    h.say("drained", 0)
    h.end(0, 0)
    h.step(100)
    assert h.numbers == [1, 2]
    assert h.supervisor.alive()
    h.say("drained", 1)
    h.end(0, 1)
    assert not h.supervisor.alive()
    assert h.supervisor.status == 0


def test_a_child_that_ends_without_a_word_is_started_again(house):
    """A handler may call os._exit(0)."""
    h = house()
    h.say("ready")
    h.end(0)
    h.step(0.11)
    assert h.numbers == [1, 1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stop_is_passed_on_and_waited_for(house, name):
    h = house(2)
    h.say("ready", 0)
    h.say("ready", 1)
    h.supervisor.signal(signal.Signals[name])
    assert [process.signals for _, process in h.started] == [[signal.Signals[name]]] * 2
    h.end(0, 0)
    h.step(5)
    assert h.numbers == [1, 2]
    assert h.supervisor.alive()
    h.end(0, 1)
    assert not h.supervisor.alive()
    assert h.supervisor.status == 0


def test_a_second_sigint_is_passed_on_too(house):
    h = house()
    h.say("ready")
    h.supervisor.signal(signal.SIGINT)
    h.supervisor.signal(signal.SIGINT)
    assert h.started[0][1].signals == [signal.SIGINT, signal.SIGINT]
    h.end(130)
    assert h.supervisor.status == 130


def test_other_signals_are_passed_on_and_stop_nothing(house):
    h = house()
    h.supervisor.signal(signal.SIGUSR1)
    assert h.started[0][1].signals == [signal.SIGUSR1]
    assert not h.supervisor.stopping


def test_a_child_that_waits_for_its_restart_is_not_started_after_a_stop(house):
    h = house()
    h.end(1)
    h.supervisor.signal(signal.SIGTERM)
    h.step(100)
    assert h.numbers == [1]
    assert not h.supervisor.alive()


def test_a_child_that_does_not_stop_is_killed(house, caplog):
    h = house(patience=35.0)
    h.supervisor.signal(signal.SIGTERM)
    h.step(34.9)
    assert h.started[0][1].signals == [signal.SIGTERM]
    h.step(0.2)
    assert h.started[0][1].signals == [signal.SIGTERM, signal.SIGKILL]
    h.step(10)
    assert h.started[0][1].signals == [signal.SIGTERM, signal.SIGKILL]
    h.end(KILLED)
    assert h.supervisor.status == 1
    assert "did not stop within 35 s and is killed" in caplog.text


def test_a_child_that_the_signal_met_before_it_could_listen_is_no_failure(house):
    h = house(2)
    h.say("ready", 0)
    h.supervisor.signal(signal.SIGINT)
    assert [process.signals for _, process in h.started] == [[signal.SIGINT], [signal.SIGTERM]]
    h.end(0, 0)
    h.end(-signal.SIGTERM, 1)
    assert h.supervisor.status == 0


def test_reload_stops_and_starts_all(house):
    h = house(2, reload=True)
    h.supervisor.restart()
    h.step()
    assert [process.signals for _, process in h.started] == [[signal.SIGTERM]] * 2
    h.end(0, 0)
    h.end(0, 1)
    assert h.numbers == [1, 2, 1, 2]


def test_with_reload_a_failed_child_waits_for_a_change(house):
    h = house(reload=True)
    for _ in range(2 * LIVES):
        before = len(h.started)
        h.end(1)
        h.step(1000)
        assert len(h.started) == before
        assert h.supervisor.alive()
        h.supervisor.restart()
        h.step()
        assert len(h.started) == before + 1


def test_counts_are_added_up_also_of_processes_that_ended(house):
    told: list[dict[str, float]] = []
    h = house(2, tell=told.append)
    h.say('{"done": 10, "work": 2}', 0)
    h.say('{"done": 5, "dead": 1, "work": 3}', 1)
    h.step(1)
    assert told[-1] == {"done": 15, "dead": 1, "work": 5}
    h.say("ready", 0)
    h.end(RECYCLE, 0)
    h.say('{"done": 1, "work": 0}')
    h.step(1)
    assert told[-1] == {"done": 16, "dead": 1, "work": 3}


def test_words_may_come_in_pieces_and_last_words_count(house):
    h = house()
    h.lines[0].send(b"rea")
    h.supervisor._listen(h.supervisor.children[0])
    assert h.supervisor.children[0].ready_at is None
    h.lines[0].send(b'dy\n{"done": 7}\n')
    h.end(KILLED)
    assert h.supervisor.counts() == {"done": 7}


def test_an_exit_status_in_words():
    assert [outcome_of(code) for code in (0, 3, KILLED, -99)] == ["status 0", "status 3", "SIGKILL", "signal 99"]


def test_the_lifeline_hears_that_the_supervisor_is_gone():
    ours, theirs = socket.socketpair()
    gone: list[bool] = []
    line = Lifeline(theirs.detach(), lambda: gone.append(True))
    line.say("ready")
    assert not line.may_recycle()
    assert not line.may_recycle()
    assert ours.recv(100) == b"ready\nrecycle\n"  # asked once
    ours.send(b"recycle\n")
    assert line.turn.wait(5)
    assert line.may_recycle()
    assert not gone
    ours.close()
    line.thread.join(5)
    assert gone == [True]


def test_children_are_told_to_be_quiet_when_they_listen(house):
    h = house(2)
    h.say("ready", 0)
    h.supervisor.signal(signal.SIGTSTP)
    assert [process.signals for _, process in h.started] == [[signal.SIGTSTP], []]  # the other would be suspended
    h.say("ready", 1)
    h.end(KILLED, 0)
    h.step(BACKOFF[0])
    h.say("ready", 2)
    assert [process.signals for _, process in h.started] == [[signal.SIGTSTP]] * 3


def test_a_child_that_an_operator_stops_is_not_started_again(house, caplog):
    caplog.set_level(logging.INFO, "barnabas")
    h = house(2)
    h.say("ready", 0)
    h.say("stopped", 0)
    h.end(0, 0, seconds=60.0)
    assert h.numbers == [1, 2] and h.supervisor.alive()
    assert "process 1 (pid 100) was stopped by an operator; it is not started again" in caplog.text
    h.say("stopped", 1)
    h.end(KILLED, 1)  # while it stopped: that is a crash
    h.step(BACKOFF[0])
    assert h.numbers == [1, 2, 2]
