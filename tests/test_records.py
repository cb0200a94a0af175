"""What a result is known by: a setting that came later does not make what was made before it be made again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from vdu_fast.config import UnlearnConfig
from vdu_fast.records import decisive, digest

RUNS = Path(__file__).parents[1] / "benchmarks" / "results" / "digits" / "runs.jsonl"


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


def test_published_results_stand():
    published = [json.loads(line)["record"] for line in RUNS.read_text().splitlines()]
    ours = next(record for record in published if record.get("method") == "ours")
    job = {name: ours[name] for name in ("label", "method", "seed")}

    def key(config: UnlearnConfig) -> str:
        return digest([job, decisive(config), ours["budget"], ours["made_from"]])

    assert key(UnlearnConfig()) == ours["key"]
    assert key(UnlearnConfig(replay_guidance=1.0)) != ours["key"]
