"""The scripts in benchmarks/: what they take for done already must be what they would measure now."""

from __future__ import annotations

import copy
import csv
import importlib.util
import itertools
import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy
import pytest
from test_baselines import OURS, PRETRAIN, settings_of
from test_comparison import shades

from vdu_fast import request_bank
from vdu_fast.baselines import METHOD_NAMES, get_method
from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.checkpoint import fingerprint
from vdu_fast.comparison import Comparison
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.persistence import PersistenceConfig
from vdu_fast.report import plain

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
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
        sweep.measure_missing(["start", "lambda 20"], [3, 4], EvaluationConfig(samples=10), "0/1")
        assert sweep.done == [({}, 3), ({}, 4), ({"replay_weight": 20.0}, 3), ({"replay_weight": 20.0}, 4)]
        sweep.measure_missing(["start", "lambda 20"], [3, 4, 5], EvaluationConfig(samples=10), "0/1")
        assert sweep.done[4:] == [({}, 5), ({"replay_weight": 20.0}, 5)]

    def test_a_run_under_other_defaults_or_another_evaluation_is_repeated(self, sweep, monkeypatch):
        sweep.measure_missing(["start"], [3], EvaluationConfig(samples=10), "0/1")
        sweep.measure_missing(["start"], [3], EvaluationConfig(samples=11), "0/1")
        sweep.measure_missing(["start"], [3], EvaluationConfig(samples=10, seed=7), "0/1")
        monkeypatch.setattr(sweep, "UnlearnConfig", lambda **changes: UnlearnConfig(**changes | {"hinge_ratio": 9.0}))
        sweep.measure_missing(["start"], [3], EvaluationConfig(samples=10), "0/1")
        assert sweep.done == [({}, 3)] * 4

    def test_one_setting_under_two_names_runs_once(self, sweep, monkeypatch):
        monkeypatch.setitem(sweep.SETTINGS, "the start once more", {"steps": UnlearnConfig().steps})
        sweep.measure_missing(["start", "the start once more"], [3], EvaluationConfig(samples=10), "0/1")
        assert sweep.done == [({}, 3)]

    def test_parts_share_the_work(self, sweep):
        for part in ("0/2", "1/2"):
            sweep.measure_missing(["start"], [0, 1, 2], EvaluationConfig(samples=10), part)
        assert [digit for _, digit in sweep.done] == [0, 2, 1]

    def test_settings_are_not_chosen_on_the_noise_they_are_reported_on(self, sweep):
        assert EvaluationConfig().seed != sweep.EVALUATION_SEED


class TestTuneMethods:
    @pytest.fixture
    def tuning(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return script("tune_methods")

    def test_the_defaults_of_every_method_are_what_did_best(self, tuning):
        for name, tries in tuning.SETTINGS.items():
            settings = get_method(name).settings
            finalists = [changes for changes, _ in tuning.standing(name, tries, tuning.FIRST)[: tuning.FINALISTS]]
            standing = tuning.standing(name, finalists, tuning.SECOND)
            assert len(standing) == tuning.FINALISTS, name
            assert settings() == settings(**standing[0][0] | tuning.SET_LATER.get(name, {})), name

    def test_every_method_gets_the_same_number_of_tries(self, tuning):
        assert {len(tries) for tries in tuning.SETTINGS.values()} == {8}
        assert set(tuning.SETTINGS) == set(METHOD_NAMES) - {"retrain"}

    def test_the_best_keeps_what_it_should_then_forgets_then_keeps_best(self, tuning):
        order = [
            {"pul": 97.5, "u_fid": 2.0, "original": 5.0},
            {"pul": 100.0, "u_fid": 3.0, "original": 5.0},
            {"pul": 96.0, "u_fid": 4.0, "original": 5.0},
            {"pul": 20.0, "u_fid": 1.0, "original": 5.0},
            {"pul": 98.0, "u_fid": 60.0, "original": 5.0},
            {"pul": 100.0, "u_fid": 70.0, "original": 5.0},
            {"pul": 0.0, "u_fid": 6.0, "original": 5.0},
        ]
        assert sorted(random.Random(0).sample(order, len(order)), key=lambda means: tuning.rank(means, 97.0)) == order

    def test_a_round_counts_settings_that_ran_on_all_of_its_digits(self, tuning, monkeypatch):
        which = tuning.Round((0, 4), 20, 90.0)
        tries = [{"hinge_ratio": 2.0}, {"hinge_ratio": 4.0}]

        def row(changes, digit, pul):
            key = tuning.run_key("ours", changes, digit, which.evaluation)
            return {"key": key, "pul": pul, "u_fid": "2", "oracle": "1", "original": "5", "floor": ""}

        found = [row(tries[0], 0, "100"), row(tries[0], 4, "90"), row(tries[1], 0, "100")]
        monkeypatch.setattr(tuning, "rows", lambda path: found)
        assert tuning.standing("ours", tries, which) == [
            (tries[0], {"pul": 95.0, "u_fid": 2.0, "oracle": 1.0, "original": 5.0})
        ]

    def test_it_is_not_tuned_on_the_noise_of_the_tables(self, tuning):
        assert EvaluationConfig().seed != tuning.EVALUATION_SEED


class TestProtocol:
    """The whole of a protocol on a model of a few thousand weights, that was trained for a few steps."""

    @pytest.fixture
    def protocol(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return script("protocol")

    @pytest.fixture
    def bench(self, protocol, tmp_path, monkeypatch):
        images = shades(80, 0)
        path = tmp_path / "shades.npz"
        numpy.savez(path, images=images.images.numpy(), labels=images.labels.numpy())
        small = protocol.Protocol(
            classes=(0,),
            shared_classes=(0,),
            seeds=2,
            retrain_seeds=1,
            persistent=("ours",),
            pretraining=PRETRAIN,
            forget_counts=(8,),
            checkpoint_counts=(2, 4),
            methods=("neg_grad", "retrain"),
            evaluation=EvaluationConfig(samples=24, sampler_steps=3, batch_size=24, loss_images=8, loss_timesteps=2),
            settings={"ours": OURS, "neg_grad": settings_of("neg_grad")},
        )
        protocol.PERSISTENCE = PersistenceConfig(
            relearn_images=2, unrelated_images=4, relearn_steps=(0, 1), relearn_batch_size=4, relearn_samples=20,
            inverted_images=4, membership_timesteps=2,
        )  # fmt: skip
        chosen = Comparison.settings_of

        def settings(self, method):
            """The defaults would take a minute."""
            return chosen(self, method) if method in self.settings else replace(OURS, replay_weight=2.0)

        monkeypatch.setattr(Comparison, "settings_of", settings)
        bench = protocol.Bench(small, str(path), tmp_path / "runs", processes=1)
        _, drawn = bench.base.classifier.embed_and_classify(bench.base.original_samples[:20])
        label = int(drawn.bincount().argmax())  # one that the model draws
        bench.protocol = replace(
            small,
            classes=(label,),
            shared_classes=(label,),
            persistent_classes=(label,),
            study_classes=(label,),
            sequence=(label,),
        )
        return bench

    def test_it_runs_once_and_tells_all(self, protocol, bench, tmp_path, monkeypatch):
        def everything(bench):
            return bench.persistence(), bench.comparison(), bench.studies(), bench.sequences()

        persistent, records, studies, sequences = everything(bench)
        made = []
        monkeypatch.setattr(Comparison, "run", lambda self, job: made.append(job))
        again = copy.copy(bench)
        again.base = replace(bench.base)
        assert plain(everything(again)) == plain((persistent, records, studies, sequences))
        assert made == []
        assert [(record["method"], record["seed"]) for record in records] == [
            ("ours", 0), ("neg_grad", 0), ("retrain", 0), ("ours", 1), ("neg_grad", 1)
        ]  # fmt: skip
        assert list(studies) == [
            "default settings", "8 forget images", "2 checkpoints", "4 checkpoints", "1 checkpoint, Fisher"
        ]  # fmt: skip
        assert {record["forget_images"] for record in studies["8 forget images"]} == {8}
        protocol.write_results(tmp_path / "results", bench.protocol, records, persistent, studies, sequences)
        rows = list(csv.DictReader((tmp_path / "results" / "runs.csv").open()))
        assert len(rows) == len(records) + 2 * len(studies)
        asked = [row for row in rows if row["half_life"]]
        assert [(row["method"], row["seed"], row["study"]) for row in asked] == [("ours", "0", "")]
        name = records[0]["class"]
        text = (tmp_path / "results" / "studies.md").read_text()
        assert f"PUL of {name}" in text
        assert [(sequence["seed"], sequence["way"]) for sequence in sequences] == list(
            itertools.product(range(2), ("passed-on", "new-banks", "at-once"))
        )
        assert all([list(request["pul"]) for request in sequence["requests"]] == [[name]] for sequence in sequences)
        assert "| all at once |" in text
        assert f"| forget {name} |" in text
        assert "| these settings | 2 |" in text
        assert "| default settings | 2 |" in text
        assert "| 8 forget images | 2 |" in text
        assert f"| {name} |" in (tmp_path / "results" / "classes.md").read_text()
        for picture in ("tradeoff.png", "persistence.png", "studies.png"):
            assert (tmp_path / "results" / picture).read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(("way", "banks"), [("passed-on", 1), ("new-banks", 2), ("at-once", 1)])
    def test_a_request_replays_what_the_last_one_passed_on(self, protocol, bench, monkeypatch, way, banks):
        drawn, requests, build = [], [], request_bank.build_bank

        def counted(*arguments, **options):
            drawn.append(build(*arguments, **options))
            return drawn[-1]

        def judge(denoiser, gone):
            requests.append(fingerprint(denoiser.module))
            return {"gone": list(gone)}

        monkeypatch.setattr(request_bank, "build_bank", counted)
        monkeypatch.setattr(protocol.sequence, "_Judge", lambda comparison: judge)
        record = protocol.sequence.run(bench.base, protocol.sequence.Sequence((1, 2), way, 0))
        assert [request["gone"] for request in record["requests"]] == ([[1, 2]] if way == "at-once" else [[1], [1, 2]])
        assert len(drawn) == banks
        # A new one is drawn by the model of now.
        models = [fingerprint(bench.base.original.module), *requests]
        assert [bank.made_from["model"] for bank in drawn] == models[:banks]

    def test_settings_with_a_row_are_not_run_again(self, protocol, bench, tmp_path, monkeypatch):
        module = script("fashion_settings")
        monkeypatch.setattr(module, "TABLE", tmp_path / "settings.csv")
        monkeypatch.setattr(module, "SETTINGS", {"short": asdict(OURS), "shorter": asdict(OURS) | {"steps": 2}})
        monkeypatch.setattr(module, "PROTOCOLS", {module.NAME: bench.protocol})
        module.measure_missing(bench, ["short"])
        monkeypatch.setattr(module, "run_all", None)
        module.measure_missing(bench, ["short"])
        rows = module.rows(module.TABLE)
        assert [row["setting"] for row in rows] == ["short"]
        assert float(rows[0]["ratio"]) == pytest.approx(float(rows[0]["u_fid"]) / float(rows[0]["oracle"]), abs=0.01)

    def test_committed_settings_are_those_of_the_script(self, protocol):
        module = script("fashion_settings")
        for row in module.rows(module.TABLE):
            assert json.loads(row["changes"]) == module.SETTINGS[row["setting"]]
            UnlearnConfig(**module.SETTINGS[row["setting"]])

    def test_tries_of_other_methods_with_a_row_are_not_run_again(self, protocol, bench, tmp_path, monkeypatch):
        module = script("fashion_methods")
        tries = [("neg_grad", {"steps": 1, "batch_size": 4}), ("neg_grad", {"steps": 2, "batch_size": 4})]
        monkeypatch.setattr(module, "TABLE", tmp_path / "method_settings.csv")
        monkeypatch.setattr(module, "JOBS", tries)
        monkeypatch.setattr(module, "TRIES", {"neg_grad": [changes for _, changes in tries]})
        monkeypatch.setattr(module, "CLASS", 1)
        module.measure_missing(bench, tries[:1])
        monkeypatch.setattr(Comparison, "run", None)
        module.measure_missing(bench, tries[:1])
        found = module.rows(module.TABLE)
        assert [(row["method"], row["steps"]) for row in found] == [("neg_grad", "1")]
        assert module.standing("neg_grad")[0][0] == tries[0][1]

    def test_other_methods_have_on_fashion_mnist_what_did_best_there(self, protocol):
        module = script("fashion_methods")
        settings = protocol.PROTOCOLS[module.NAME].settings
        assert module.CLASS not in protocol.PROTOCOLS[module.NAME].shared_classes
        for name in set(settings) - {"ours"}:
            standing = module.standing(name)
            assert len(standing) == len(module.TRIES[name]), name
            assert settings[name] == get_method(name).settings(**standing[0][0]), name

    def test_another_machine_goes_on_where_it_was_stopped(self, protocol, bench, tmp_path, monkeypatch):
        bench.protocol = replace(bench.protocol, seeds=1)
        jobs, run = [], Comparison.run

        def counted(self, job):
            jobs.append(job.method)
            if len(jobs) == 2:
                bench.deadline = 0.0
            return run(self, job)

        monkeypatch.setattr(Comparison, "run", counted)
        records = bench.comparison()
        assert [record["method"] for record in records] == jobs == ["ours", "neg_grad"]
        assert bench.persistence() == bench.sequences() == []
        results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
        published = protocol.PublishedRuns(results, bench.output)
        published.publish(bench.current, bench.judge)
        assert (results / "model" / "posterior.safetensors").exists()
        assert not (results / "model" / "checkpoints").exists()
        # What has nothing to add takes nothing away, but for runs that another judge has measured.
        published.publish({}, bench.judge)
        monkeypatch.setattr(protocol, "pretrain", None)
        data = str(tmp_path / "shades.npz")
        taken = protocol.PublishedRuns(results, elsewhere)
        assert len(taken.records) == 2
        other = protocol.Bench(bench.protocol, data, elsewhere, processes=1, take_over=taken)
        assert plain(other.comparison()[:2]) == plain(records)
        assert jobs == ["ours", "neg_grad", "retrain"]
        taken.publish({}, "another judge")
        assert (results / "runs.jsonl").read_text() == ""

    def test_a_run_is_taken_over_where_it_is_current_and_tells_more(self, protocol, tmp_path):
        results, output = tmp_path / "results", tmp_path / "runs"
        path = output / "runs" / "one.json"
        protocol.PublishedRuns(results, output).publish({path: {"key": "now", "judge": "a", "extra": 1}}, "a")
        published = protocol.PublishedRuns(results, output)
        for key, judge in (("before", "a"), ("now", "b")):
            published.take_over(path, key, judge)
            assert not path.exists()
        for local in ({"key": "before", "judge": "a", "extra": 2, "more": 3}, {"key": "now", "judge": "a"}):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(json.dumps(local))
            published.take_over(path, "now", "a")
            assert json.loads(path.read_text())["extra"] == 1
        path.write_text(json.dumps({"key": "now", "judge": "a", "extra": 2}))
        published.take_over(path, "now", "a")
        assert json.loads(path.read_text())["extra"] == 2
        (results / "runs.jsonl").write_text("<<<<<<< HEAD\n")
        with pytest.raises(InputError, match=r"line 1 of .* is not a run"):
            protocol.PublishedRuns(results, output)

    def test_a_model_of_another_training_is_refused(self, protocol, bench):
        config = replace(bench.protocol.pretraining, steps=9)
        with pytest.raises(InputError, match="trained in another way"):
            protocol.trained(bench.train, bench.output / "model", config)

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["digits", "--jobs", "0"], "--jobs must be at least 1, got 0"),
            (["digits", "--seeds", "0"], "--seeds must be at least 1, got 0"),
            (["digits", "--hours", "nan"], "--hours must be 0 or more, got nan"),
            (["digits", "--go_on", "--results", "/nowhere"], "there is no folder /nowhere"),
            (["fashion_mnist"], "--data is missing"),
        ],
    )
    def test_what_cannot_be_is_refused(self, protocol, monkeypatch, capsys, flags, says):
        monkeypatch.setattr("sys.argv", ["protocol.py", *flags])
        with pytest.raises(SystemExit, match="2"):
            protocol.main()
        assert says in capsys.readouterr().err

    def test_tables_are_written_of_what_there_is(self, protocol, bench, tmp_path):
        (tmp_path / "studies.md").write_text("of other settings")
        protocol.write_results(tmp_path, bench.protocol, [], [], {}, [])
        assert not (tmp_path / "studies.md").exists()
        assert not (tmp_path / "table.md").exists()
        assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1

    def test_posteriors_of_fewer_checkpoints_end_with_the_same_one(self, protocol, bench):
        used = {name: comparison.posterior.source for name, comparison in bench._variants() if "checkpoints" in name}
        assert [source["count"] for source in used.values()] == ["2", "4"]

    def test_the_targets_are_held_against_means_over_classes(self, protocol):
        def record(label, seed, pul, ratio):
            u_fid = {"before": 5.0, "after": 2.0 * ratio, "oracle": 2.0}
            shares = {"kept_ratio_min": 0.8, "kept_ratio_min_class": 1}
            counts = {"samples": 10, "forgotten_before": 3, "forgotten_after": 1}
            metrics = {"pul": pul, "pul_heldout": 95.0, "u_fid": u_fid, "shares": shares, "counts": counts}
            return {
                "label": label, "class": str(label), "seed": seed,
                "metrics": metrics | {"sampler": {"name": "DDIM", "steps": 3, "seed": 1}},
            }  # fmt: skip

        records = [record(0, 0, 99.5, 1.0), record(0, 1, 100.0, 1.2), record(1, 0, 97.0, 1.5), record(1, 1, 98.0, 1.7)]
        text = protocol.tables.classes_markdown(records)
        assert "| 0 | 3, 1.0 | 99.8 ± 0.2 | 95.0 |" in text
        assert "**98.6 ± 1.1**" in text
        assert "PUL NO, u-FID NO" in text
        text = protocol.tables.classes_markdown(records[:2])
        assert "PUL yes, u-FID yes" in text
        text = protocol.tables.classes_markdown(records[:2], planned=4)
        assert "Not all have run yet: 2 of 4 runs." in text
        assert "Met" not in text

    def test_the_tables_of_the_data_sets_hold_what_was_asked(self, protocol):
        digits, fashion = protocol.PROTOCOLS["digits"], protocol.PROTOCOLS["fashion_mnist"]
        assert len(digits.classes) == 10
        assert len(digits.shared_classes) >= 4
        assert len(fashion.classes) >= 5
        assert len(fashion.shared_classes) >= 3
        for one in (digits, fashion):
            assert set(one.methods) == set(METHOD_NAMES) - {"ours"}
            assert one.seeds >= 3
            assert set(one.shared_classes) <= set(one.classes)

    def test_a_fixed_budget_pays_for_ours_whatever_its_share_of_forgetting_steps(self, protocol):
        fashion = protocol.PROTOCOLS["fashion_mnist"]
        most = evaluations_of_unlearn(replace(fashion.settings["ours"], forget_share=1.0), 6000)
        assert most <= fashion.evaluations
