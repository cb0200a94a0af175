"""Marks of a run: exclusive times, memory, and nothing at all while nobody records."""

from __future__ import annotations

import threading

import pytest
import torch

from vdu_fast.phases import PREFIX, PhaseRecorder, phase
from vdu_fast.profiling.tracing import chrome_trace, memory_of_phases


class Clock:
    """Seconds that pass only when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Meter:
    """Bytes that are allocated and freed by hand."""

    held = highest = 0

    def allocate(self, count: int) -> None:
        self.held += count
        self.highest = max(self.highest, self.held)

    def now(self) -> int:
        return self.held

    def peak(self) -> int:
        peak, self.highest = self.highest, self.held
        return peak


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nested_phases_subtract_from_the_outer_one(clock):
    recorder = PhaseRecorder(clock=clock)
    with recorder.recording():
        clock.wait(100)  # in no phase
        with phase("outer"):
            clock.wait(1)
            with phase("inner"):
                clock.wait(2)
                with phase("innermost"):
                    clock.wait(4)
                clock.wait(8)
            clock.wait(16)
            with phase("inner"):
                clock.wait(32)
        clock.wait(100)
    costs = recorder.take()
    assert {name: cost.seconds for name, cost in costs.items()} == {"outer": 17, "inner": 42, "innermost": 4}
    assert recorder.take() == {}


def test_a_decorated_function_is_a_phase_at_every_call_and_within_itself(clock):
    @phase("work")
    def work(depth: int) -> int:
        clock.wait(1)
        return work(depth - 1) if depth else 7

    recorder = PhaseRecorder(clock=clock)
    with recorder.recording():
        assert work(2) == 7
        work(0)
    assert recorder.take()["work"].seconds == 4


def test_a_phase_ends_when_its_block_raises(clock):
    @phase("fails")
    def fail() -> None:
        clock.wait(1)
        raise ValueError("on purpose")

    recorder = PhaseRecorder(clock=clock)
    with recorder.recording():
        with pytest.raises(ValueError, match="on purpose"):
            fail()
        clock.wait(10)
        with phase("next"):
            clock.wait(2)
    assert {name: cost.seconds for name, cost in recorder.take().items()} == {"fails": 1, "next": 2}


def test_nothing_is_recorded_while_nobody_asks(clock):
    recorder = PhaseRecorder(clock=clock)
    with phase("before"):
        clock.wait(1)
    with recorder.recording():
        pass
    with phase("after"):
        clock.wait(1)
    assert recorder.take() == {}


def test_another_thread_is_not_recorded(clock):
    recorder = PhaseRecorder(clock=clock)

    def elsewhere() -> None:
        with phase("elsewhere"):
            clock.wait(1)

    with recorder.recording():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert recorder.take() == {}


def test_memory_is_what_a_phase_takes_and_what_is_taken_in_all(clock):
    meter = Meter()
    recorder = PhaseRecorder(meter=meter, clock=clock)
    meter.allocate(1000)
    with recorder.recording(), phase("step"):
        with phase("forward"):
            meter.allocate(50)
            meter.allocate(-10)
        with phase("backward"):
            meter.allocate(5)
            meter.allocate(-45)
    costs = recorder.take()
    assert {name: (cost.rise, cost.peak) for name, cost in costs.items()} == {
        "step": (0, 40),
        "forward": (50, 50),
        "backward": (5, 45),
    }


def test_a_trace_holds_the_phases_and_their_memory():
    def work() -> None:
        with PhaseRecorder().recording(), phase("step"):
            with phase("forward"):
                kept = torch.zeros(1000)
                torch.zeros(500)
            with phase("backward"):
                other = torch.zeros(100)
            del kept, other

    held = torch.zeros(300)  # before the trace: the profiler counts it in, the phases must not
    chrome_trace(lambda: torch.zeros(200) + held[:200])
    trace = chrome_trace(work)
    assert (PREFIX + "forward").encode() in trace
    costs = memory_of_phases(trace, "step")
    assert (costs["forward"].rise, costs["forward"].peak) == (6000, 6000)
    assert (costs["backward"].rise, costs["backward"].peak) == (400, 4400)
    assert (costs["step"].rise, costs["step"].peak) == (0, 4400)
