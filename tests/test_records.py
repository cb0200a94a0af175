"""What a result is known by: a setting that came later does not make what was made before it be made again."""

from __future__ import annotations

from dataclasses import dataclass, field

from vdu_fast.config import UnlearnConfig
from vdu_fast.records import decisive, digest


@dataclass
class Earlier:
    steps: int = 3


@dataclass
class Later(Earlier):
    guidance: float = field(default=1.0, metadata={"off": 0.0})


def test_a_later_setting_that_is_off_decides_nothing():
    assert decisive(Later(guidance=0.0)) == decisive(Earlier()) == {"steps": 3}


def test_a_later_setting_that_is_on_decides():
    assert decisive(Later()) == {"steps": 3, "guidance": 1.0}


def test_results_from_before_guidance_stand():
    # The digest that the settings of these results had.
    before = digest(decisive(UnlearnConfig()))
    assert before == digest(decisive(UnlearnConfig(replay_guidance=0.0)))
    assert before != digest(decisive(UnlearnConfig(replay_guidance=1.0)))
    assert "replay_guidance" not in decisive(UnlearnConfig())
