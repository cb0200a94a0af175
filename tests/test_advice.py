"""Advice: every rule speaks at its threshold, and is silent on figures that leave nothing to wish."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from vdu_fast.config import UnlearnConfig
from vdu_fast.profiling import advice
from vdu_fast.profiling.record import PhaseRow, Profile, RunPart, duration, size


def row(name: str, seconds: float, *, spread: float = 0.0) -> PhaseRow:
    """A phase of a step that takes one second in all."""
    return PhaseRow(name, seconds, seconds * (1 - spread), seconds * (1 + spread), seconds, 0, 0)


def build_profile(seconds: dict[str, float] | None = None, **changes) -> Profile:
    """Figures that no rule finds fault with, and changes to them."""
    steps = {"data": 0.1, "forward": 0.3, "loss": 0.15, "backward": 0.35, "update": 0.05, "check": 0.05} | (
        seconds or {}
    )
    fields = {
        "phases": [row(name, value) for name, value in steps.items()],
        "parts": [RunPart("bank", 10.0, True, ""), RunPart("filter", 5.0, True, ""), RunPart("steps", 85.0, True, "")],
        "step": 0.95,
        "network": 0.65,
        "overhead": 0.46,
        "check": 0.5,
        "probe": {"batch": 0.65, "doubled": 1.3, "bfloat16": 0.65, "channels_last": 0.65},
        "samples": 128,
        "passes": 1,
        "parameters": 1000,
        "trainable": 1000,
        "sample_shape": (1, 8, 8),
        "held": {},
        "memory_from": "",
        "machine": {
            "device": "cpu",
            "device_name": "a CPU",
            "threads": 4,
            "cores": 4,
            "backend": "cpu",
            "bfloat16": True,
        },
        "settings": dataclasses.asdict(UnlearnConfig()),
        "trace": b"{}",
    }
    return Profile(**(fields | changes))


def machine(**changes) -> dict[str, object]:
    return build_profile().machine | changes


def settings(**changes) -> dict[str, object]:
    return build_profile().settings | changes


def bank(seconds: float, *, estimate: bool = True) -> list[RunPart]:
    return [RunPart("bank", seconds, estimate, ""), RunPart("steps", 100 - seconds, True, "")]


CASES = {
    "unsteady": (
        {"phases": [*build_profile().phases[2:], row("forward", 0.3, spread=0.5), row("data", 0.1)]},
        "something else computes here",
    ),
    "reference_backend": ({"machine": machine(backend="reference")}, "`vdu-fast doctor`"),
    "few_threads": ({"machine": machine(threads=1)}, "1 of 4 cores compute. Give more with --threads 4"),
    "bfloat16": ({"probe": {"batch": 0.6, "bfloat16": 0.4}}, "400 ms with --precision bfloat16, 1.50 times as fast"),
    "channels_last": (
        {"probe": {"batch": 0.6, "channels_last": 0.5}},
        "500 ms with --channels_last, 1.20 times as fast",
    ),
    "small_batch": ({"probe": {"batch": 0.5, "doubled": 0.6}}, "1.20 times as long: a sample then costs 60%"),
    "much_bank": ({"parts": bank(60.0)}, "60% of the run (about 60 s). Keep it with --bank FILE"),
    "much_filter": ({"parts": [RunPart("filter", 30.0, True, ""), RunPart("steps", 70.0, True, "")]}, "30% of the run"),
    "much_checking": (
        {"parts": [RunPart("checks", 20.0, True, ""), RunPart("steps", 80.0, True, "")], "check": 2.0},
        "20% of the run. --check_every 43 (now 10) makes them 5% of the steps",
    ),
    "much_update": ({"seconds": {"update": 0.2}}, "128 samples are few for 1,000 weights"),
    "much_data": ({"seconds": {"data": 0.2}}, "Making the batch is 20% of a step"),
    "mostly_network": ({"seconds": {"forward": 0.6}}, "forward and backward are 95% of a step"),
}


def test_every_rule_is_tested():
    assert [rule.__name__ for rule in advice.RULES] == list(CASES)
    rules = {name for name, f in inspect.getmembers(advice, inspect.isfunction) if f.__module__ == advice.__name__}
    rules = {name for name in rules if not name.startswith("_")}
    assert rules == {*CASES, "advise"}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_speaks_where_its_figures_ask_for_it(rule):
    changes, expected = CASES[rule]
    profile = build_profile(**changes)
    text = getattr(advice, rule)(profile)
    assert expected.lower() in text.lower()
    assert text in advice.advise(profile)


def test_good_figures_need_no_advice():
    assert advice.advise(build_profile()) == []


@pytest.mark.parametrize(
    ("changes", "silent"),
    [
        ({"parts": bank(60.0, estimate=False)}, "much_bank"),  # it is there already
        ({"machine": machine(device="cuda:0", threads=1)}, "few_threads"),
        ({"probe": {"batch": 0.5}}, "bfloat16"),
        ({"probe": {"batch": 0.5}}, "small_batch"),
        (CASES["unsteady"][0] | {"probe": {"batch": 0.5, "doubled": 0.5}}, "small_batch"),
        (CASES["unsteady"][0] | {"probe": {"batch": 0.5, "bfloat16": 0.1}}, "bfloat16"),
    ],
)
def test_a_rule_is_silent_where_it_cannot_help(changes, silent):
    assert getattr(advice, silent)(build_profile(**changes)) is None


def test_bfloat16_without_instructions_for_it_is_questioned():
    profile = build_profile(machine=machine(bfloat16=False), settings=settings(precision="bfloat16"))
    assert "--precision float32" in str(advice.bfloat16(profile))


def test_a_larger_batch_names_the_flags_that_make_it():
    profile = build_profile(probe={"batch": 0.5, "doubled": 0.6})
    assert "--batch_size 128 --replay_batch_size 128" in str(advice.small_batch(profile))
    without = dataclasses.replace(profile, settings=settings(replay_weight=0.0))
    assert "--replay_batch_size" not in str(advice.small_batch(without))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-6, "2 µs"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (75.26, "75.3 s"), (200.0, "3.33 min"), (9000.0, "2.5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1000, "0.977 KiB"), (3 * 2**20, "3 MiB"), (2**41, "2 TiB")])
def test_sizes(count, text):
    assert size(count) == text
