"""The scripts in benchmarks/: what they take for done already must be what they would measure now."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from vdu_fast.baselines import METHOD_NAMES, get_method
from vdu_fast.config import UnlearnConfig
from vdu_fast.evaluation import EvaluationConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestDefaultSettings:
    @pytest.fixture
    def sweep(self, tmp_path, monkeypatch):
        """The script, with a results file of its own and runs that only note which they are."""
        module = script("default_settings")
        done = []

        class Bench:
            def __init__(self, evaluation):
                pass

            def run(self, changes, digit):
                done.append((changes, digit))
                return {"digit": digit, "pul": 100.0, "ratio": 1.0, "kept_min": 1.0, "seconds": 1.0}

        monkeypatch.setattr(module, "RESULTS", tmp_path / "results.csv")
        monkeypatch.setattr(module, "Bench", Bench)
        module.done = done
        return module

    def test_a_finished_run_is_not_repeated(self, sweep):
        sweep.measure_missing(["default", "lambda 20"], [3, 4], EvaluationConfig(samples=10), "0/1")
        assert sweep.done == [({}, 3), ({}, 4), ({"replay_weight": 20.0}, 3), ({"replay_weight": 20.0}, 4)]
        sweep.measure_missing(["default", "lambda 20"], [3, 4, 5], EvaluationConfig(samples=10), "0/1")
        assert sweep.done[4:] == [({}, 5), ({"replay_weight": 20.0}, 5)]

    def test_a_run_under_other_defaults_or_another_evaluation_is_repeated(self, sweep, monkeypatch):
        sweep.measure_missing(["default"], [3], EvaluationConfig(samples=10), "0/1")
        sweep.measure_missing(["default"], [3], EvaluationConfig(samples=11), "0/1")
        sweep.measure_missing(["default"], [3], EvaluationConfig(samples=10, seed=7), "0/1")
        monkeypatch.setattr(sweep, "UnlearnConfig", lambda **changes: UnlearnConfig(hinge_ratio=9.0, **changes))
        sweep.measure_missing(["default"], [3], EvaluationConfig(samples=10), "0/1")
        assert sweep.done == [({}, 3)] * 4

    def test_one_setting_under_two_names_runs_once(self, sweep, monkeypatch):
        monkeypatch.setitem(sweep.SETTINGS, "the default once more", {"steps": UnlearnConfig().steps})
        sweep.measure_missing(["default", "the default once more"], [3], EvaluationConfig(samples=10), "0/1")
        assert sweep.done == [({}, 3)]

    def test_parts_share_the_work(self, sweep):
        for part in ("0/2", "1/2"):
            sweep.measure_missing(["default"], [0, 1, 2], EvaluationConfig(samples=10), part)
        assert [digit for _, digit in sweep.done] == [0, 2, 1]

    def test_settings_are_not_chosen_on_the_noise_they_are_reported_on(self, sweep):
        assert EvaluationConfig().seed != sweep.EVALUATION_SEED


class TestTenDigits:
    @pytest.fixture
    def metrics(self):
        """What the demo of the digit 3 leaves under the defaults, as far as the script asks."""
        settings = asdict(UnlearnConfig()) | {"evaluation": asdict(EvaluationConfig(samples=1000))}
        return {"settings": settings, "forgotten_class": {"index": 3, "name": "3"}}

    def test_a_demo_under_the_defaults_is_kept(self, metrics, tmp_path):
        assert not script("ten_digits").finished(3, tmp_path)
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        assert script("ten_digits").finished(3, tmp_path)
        assert not script("ten_digits").finished(4, tmp_path)

    @pytest.mark.parametrize("change", [{"hinge_ratio": 9.0}, {"evaluation": asdict(EvaluationConfig(samples=60))}])
    def test_a_demo_under_other_settings_is_not(self, metrics, tmp_path, change):
        metrics["settings"] |= change
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        assert not script("ten_digits").finished(3, tmp_path)


class TestTuneBaselines:
    @pytest.fixture
    def tuning(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return script("tune_baselines")

    def test_the_defaults_of_every_baseline_are_what_did_best(self, tuning):
        for name in tuning.SETTINGS:
            settings = get_method(name).settings
            assert settings() == settings(**json.loads(tuning.best(name)["changes"])), name

    def test_every_method_gets_the_same_number_of_tries(self, tuning):
        assert len({len(tries) for tries in tuning.SETTINGS.values()}) == 1
        assert set(tuning.SETTINGS) == set(METHOD_NAMES) - {"ours", "retrain"}

    def test_the_best_forgets_first_and_keeps_then(self, tuning, monkeypatch):
        rows = [
            {"method": "a", "pul": "89", "u_fid": "1"},
            {"method": "a", "pul": "95", "u_fid": "3"},
            {"method": "a", "pul": "91", "u_fid": "2"},
            {"method": "b", "pul": "50", "u_fid": "9"},
            {"method": "b", "pul": "40", "u_fid": "1"},
        ]
        monkeypatch.setattr(tuning, "rows", lambda path: rows)
        assert tuning.best("a") == rows[2]
        assert tuning.best("b") == rows[3]
        assert tuning.best("c") is None

    def test_it_is_not_tuned_on_the_noise_of_the_tables(self, tuning):
        assert EvaluationConfig().seed != tuning.EVALUATION_SEED
