"""Comparisons on a model of a few thousand weights: every run once, and the right numbers in the table."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from scipy.stats import ttest_rel
from test_baselines import OURS, PRETRAIN, settings_of
from tiny import build_pipeline, random_posterior

from vdu_fast.baselines import METHOD_NAMES
from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.checkpoint import write_json_atomic
from vdu_fast.cli import main
from vdu_fast.cli.compare import _methods
from vdu_fast.comparison import Comparison, Job, plan, read_pretraining, run_all
from vdu_fast.comparison_report import holm, summarize, table_csv, table_markdown, write_comparison
from vdu_fast.data import ImageSet
from vdu_fast.demo import shipped_model
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.persistence import PersistenceConfig
from vdu_fast.persistence_report import draw_persistence

PERSISTENCE = PersistenceConfig(
    relearn_images=2, relearn_steps=(0, 1, 2), relearn_batch_size=4, relearn_samples=20, inverted_images=4,
    membership_timesteps=2,
)  # fmt: skip
CONFIG = EvaluationConfig(samples=24, sampler_steps=3, batch_size=24, loss_images=8, loss_timesteps=2)


def shades(count: int, seed: int) -> ImageSet:
    """Noise of three brightnesses."""
    labels = torch.arange(count) % 3
    noise = 0.6 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ImageSet((noise + (labels - 1)[:, None, None, None] * 0.1).clamp(-1, 1), labels, ("a", "b", "c"), "shades")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pipeline folder with its posterior and the record of a training."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = build_pipeline()
    pipeline.save_pretrained(str(folder))
    random_posterior(pipeline.unet).save(folder / "posterior.safetensors")
    return folder


@pytest.fixture
def comparison(model, tmp_path) -> Comparison:
    settings = {"ours": OURS, **{name: settings_of(name) for name in ("neg_grad", "fine_tune", "siss")}}
    posterior = model / "posterior.safetensors"
    return Comparison(model, posterior, shades(60, 0), shades(30, 1), tmp_path, CONFIG, settings, "cpu")


def drawn(comparison: Comparison) -> int:
    """The class that the model draws most often."""
    _, labels = comparison.classifier.embed_and_classify(comparison.original_samples[: CONFIG.samples])
    return int(torch.bincount(labels).argmax())


def counting(monkeypatch) -> list[Job]:
    """The jobs that are run from now on."""
    made, run = [], Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, job: (made.append(job), run(self, job))[1])
    return made


def record(method: str, label: int, seed: int, pul: float, u_fid: float) -> dict:
    """What one run leaves, as far as the table asks."""
    side = {"after": u_fid, "before": 5.0, "oracle": 2.0, "floor": 0.5}
    return {
        "method": method, "title": method.upper(), "sees": "forget data", "label": label, "class": f"c{label}",
        "seed": seed, "evaluations": 1000, "seconds": 2.0 + seed,
        "metrics": {
            "pul": pul, "pul_heldout": 96.0, "u_fid": side,
            **dict.fromkeys(("kid", "precision", "recall", "density", "coverage"), side),
            "shares": {"kept_ratio_min": 0.8}, "forget_loss": {"ratio": 2.0}, "retained_loss": {"ratio": 1.1},
            "counts": {"samples": 24}, "sampler": {"name": "DDIM", "steps": 3, "seed": 1},
        },
    }  # fmt: skip


def persistence(life: float | None, counts: list[int], worst: float = 0.6) -> dict:
    """What `measure_persistence` finds of a run, as far as the table and the picture ask."""
    relearned = {"images": 8, "counts": counts, "half_life": life}
    unrelated = {"images": 8, "counts": [0, 1, 2], "half_life": None}
    return {
        "settings": {"relearn_learning_rate": 1e-4, "membership_timesteps": 20},
        "relearning": {"samples": 200, "before": 20, "steps": [0, 10, 40], "forget": relearned, "unrelated": unrelated},
        "inversion": {"images": 50, "steps": 3, "before": 0.98, "after": 0.25},
        "membership": {"before": {"worst": 0.7}, "after": {"worst": worst}, "spread": 0.05},
    }


RECORDS = [
    record(method, label, seed, pul + 2 * seed - label, u_fid * (1 + 0.1 * seed + 0.05 * label))
    for method, pul, u_fid in (("ours", 95.0, 2.2), ("neg_grad", 97.0, 90.0), ("fine_tune", 94.0, 2.1))
    for label in (0, 3)
    for seed in (0, 1, 2)
]


class TestRuns:
    def test_a_comparison_goes_on_where_it_was(self, comparison, monkeypatch):
        label = drawn(comparison)
        jobs = plan(["ours", "neg_grad", "fine_tune"], [label], 2)
        made = counting(monkeypatch)
        first = run_all(comparison, jobs[:3])
        assert made == jobs[:3]
        texts = []
        again = replace(comparison)  # another process, which has nothing but the files
        records = run_all(again, jobs, progress=lambda done, total, text: texts.append((done, total)))
        assert made == jobs
        assert records[:3] == first
        assert texts == [(3, 6), (4, 6), (5, 6), (6, 6)]
        assert [r["method"] for r in records] == [job.method for job in jobs]
        assert {r["seed"] for r in records} == {0, 1}

    def test_a_run_is_made_again_when_what_it_depends_on_changed(self, comparison, monkeypatch):
        jobs = plan(["neg_grad", "fine_tune"], [drawn(comparison)], 1)
        run_all(comparison, jobs)
        made = counting(monkeypatch)
        other = dict(comparison.settings) | {"neg_grad": replace(settings_of("neg_grad"), learning_rate=2e-3)}
        run_all(replace(comparison, settings=other), jobs)
        assert made == jobs[:1]
        run_all(replace(comparison, settings=other, config=replace(CONFIG, seed=7)), jobs)
        assert made == [jobs[0], *jobs]
        run_all(replace(comparison, settings=other, config=replace(CONFIG, seed=7), train=shades(60, 5)), jobs)
        assert made == [jobs[0], *jobs, *jobs]

    def test_a_record_holds_what_was_spent_seen_and_measured(self, comparison):
        label = drawn(comparison)
        (record,) = run_all(comparison, [Job(label, "siss", 0)])
        on_disk = json.loads(comparison.path(Job(label, "siss", 0)).read_text())
        assert on_disk == record
        assert record["budget"] == evaluations_of_unlearn(OURS, len(comparison.train.only(label)))
        assert record["evaluations"] <= record["budget"]
        assert record["sees"] == "forget + retained data"
        assert record["class"] == comparison.train.class_names[label]
        assert record["settings"]["learning_rate"] == 1e-3
        assert set(record["metrics"]) >= {"pul", "u_fid", "kid", "recall", "shares"}
        assert record["metrics"]["classifier"]["seed"] == CONFIG.classifier_seed

    def test_fewer_forget_images_are_other_ones_for_every_seed(self, comparison, monkeypatch):
        label = drawn(comparison)
        few = replace(comparison, forget_images=8)
        assert len(few.forget_of(label, 0)) == 8
        assert not torch.equal(few.forget_of(label, 0), few.forget_of(label, 1))
        assert torch.equal(few.forget_of(label, 0), few.forget_of(label, 0))
        assert few.budget(label) == evaluations_of_unlearn(OURS, 8) < comparison.budget(label)
        jobs = plan(["neg_grad"], [label], 1)
        (everything,) = run_all(comparison, jobs)
        assert everything["forget_images"] == len(comparison.train.only(label))
        made = counting(monkeypatch)
        (record,) = run_all(few, jobs)
        assert made == jobs
        assert record["forget_images"] == 8

    def test_more_forget_images_than_there_are_is_all(self, comparison):
        label = drawn(comparison)
        assert len(replace(comparison, forget_images=10_000).forget_of(label, 0)) == len(comparison.train.only(label))

    @pytest.mark.parametrize("name", ["forget_images", "evaluations"])
    def test_none_at_all_are_refused(self, comparison, name):
        with pytest.raises(InputError, match=f"{name}: got 0"):
            replace(comparison, **{name: 0})

    def test_every_method_may_spend_what_was_said(self, comparison, monkeypatch):
        label = drawn(comparison)
        jobs = plan(["fine_tune", "ours"], [label], 1)
        needed = comparison.budget(label)
        endless = dict(comparison.settings) | {"fine_tune": replace(settings_of("fine_tune"), steps=None)}
        comparison = replace(comparison, settings=endless)
        twice = replace(comparison, evaluations=2 * needed)
        usual, generous = run_all(comparison, jobs), run_all(twice, jobs)
        assert [record["budget"] for record in usual + generous] == [needed] * 2 + [2 * needed] * 2
        # Fine-tuning spends what it gets, ours what it needs.
        assert usual[0]["evaluations"] < needed < generous[0]["evaluations"]
        assert generous[1]["evaluations"] == usual[1]["evaluations"]
        with pytest.raises(InputError, match=f"budget: {needed - 1} network evaluations, and these settings need"):
            run_all(replace(comparison, evaluations=needed - 1), [Job(label, "ours", 0)])

    def test_comparisons_of_one_model_share_what_they_can(self, comparison, monkeypatch):
        label = drawn(comparison)
        monkeypatch.setattr("vdu_fast.comparison.train_classifier", None)
        monkeypatch.setattr("vdu_fast.comparison.sample_images", None)
        elsewhere = replace(comparison, output=comparison.output / "b", shared=comparison.output / "shared")
        (record,) = run_all(elsewhere, plan(["neg_grad"], [label], 1))
        assert elsewhere.path(Job(label, "neg_grad", 0)).is_file()
        assert record["metrics"]["pul"] is not None

    def test_judge_and_original_samples_are_made_once(self, comparison, monkeypatch):
        label = drawn(comparison)
        monkeypatch.setattr("vdu_fast.comparison.train_classifier", None)
        monkeypatch.setattr("vdu_fast.comparison.sample_images", None)
        run_all(replace(comparison), plan(["neg_grad"], [label], 2))
        assert len(list((comparison.output / "shared").iterdir())) == 2

    def test_persistence_is_asked_of_what_was_evaluated_before(self, comparison, monkeypatch):
        jobs = plan(["neg_grad"], [drawn(comparison)], 1)
        (evaluated,) = run_all(comparison, jobs)
        asking = replace(comparison, persistence=PERSISTENCE)
        with monkeypatch.context() as patch:
            patch.setattr("vdu_fast.comparison.evaluate", None)
            (asked,) = run_all(asking, jobs)
        assert {name: part for name, part in asked.items() if name != "persistence"} == evaluated
        assert set(asked["persistence"]) >= {"relearning", "inversion", "errors", "membership"}
        made = counting(monkeypatch)
        assert run_all(asking, jobs) == [asked]
        assert run_all(comparison, jobs) == [evaluated]  # without the question there is no answer
        assert not made
        other = replace(PERSISTENCE, relearn_steps=(0, 1))
        (longer,) = run_all(replace(comparison, persistence=other), jobs)
        assert made == jobs
        assert longer["persistence"]["relearning"]["steps"] == [0, 1]

    def test_an_evaluation_survives_a_stop_in_the_middle_of_persistence(self, comparison, monkeypatch):
        jobs = plan(["neg_grad"], [drawn(comparison)], 1)
        asking = replace(comparison, persistence=PERSISTENCE)

        def stop(*models, **how):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("vdu_fast.comparison.measure_persistence", stop)
            with pytest.raises(KeyboardInterrupt):
                run_all(asking, jobs)
        monkeypatch.setattr("vdu_fast.comparison.evaluate", None)
        (record,) = run_all(asking, jobs)
        assert record["persistence"]["settings"]["relearn_samples"] == PERSISTENCE.relearn_samples

    @pytest.mark.slow
    def test_processes_find_the_same(self, comparison):
        jobs = plan(["neg_grad", "fine_tune"], [drawn(comparison)], 1)
        records = run_all(comparison, jobs, processes=2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            here = [comparison.run(job) for job in jobs]
        finally:
            torch.set_num_threads(threads)
        assert [r["metrics"] for r in records] == [r["metrics"] for r in here]

    @pytest.mark.slow
    def test_processes_end_with_what_they_have_begun(self, comparison):
        jobs = plan(["neg_grad", "fine_tune"], [drawn(comparison)], 3)

        def stop(done, total, text):
            if done:
                raise TimeoutError

        with pytest.raises(TimeoutError):
            run_all(comparison, jobs, processes=2, progress=stop)
        # One is done, and one was under way and is finished; nothing goes on behind.
        made = [job for job in jobs if comparison.finished(job) is not None]
        assert 1 <= len(made) <= 2
        assert all(job in jobs[:3] for job in made)

    def test_a_class_that_is_never_drawn_is_refused_before_anything_is_run(self, comparison, monkeypatch):
        _, labels = comparison.classifier.embed_and_classify(comparison.original_samples[: CONFIG.samples])
        absent = next(label for label in range(3) if label not in labels)
        made = counting(monkeypatch)
        with pytest.raises(InputError, match="the original model drew no image of class"):
            run_all(comparison, plan(["neg_grad"], [absent], 1))
        assert not made

    def test_seeds_and_classes_take_turns(self):
        jobs = plan(["x", "y"], [0, 3], 2)
        assert [(j.seed, j.label, j.method) for j in jobs] == [
            (seed, label, method) for seed in (0, 1) for label in (0, 3) for method in "xy"
        ]

    def test_retraining_needs_the_record_of_the_training(self, comparison, model, tmp_path):
        with pytest.raises(InputError, match=r"--methods: retrain needs the pretrain\.json.*Leave retrain out"):
            run_all(comparison, [Job(0, "retrain", 0)])
        write_json_atomic(tmp_path / "pretrain.json", {"settings": {"steps": 8, "checkpoints": 4, "channels": [8]}})
        assert read_pretraining(tmp_path) == replace(
            PRETRAIN, anneal_steps=600, warmup_steps=100, batch_size=64, device="auto"
        )
        (tmp_path / "pretrain.json").write_text('{"settings": {"stairs": 1}}')
        with pytest.raises(InputError, match=r"--model: .*pretrain\.json does not hold the settings"):
            read_pretraining(tmp_path)


class TestTable:
    def test_means_and_standard_errors(self):
        row = {row.method: row for row in summarize(RECORDS)}["ours"]
        puls = [95.0 + 2 * seed - label for label in (0, 3) for seed in (0, 1, 2)]
        mean = sum(puls) / 6
        assert row.runs == 6
        assert row.means["pul"].value == pytest.approx(mean)
        spread = math.sqrt(sum((p - mean) ** 2 for p in puls) / 5)
        assert row.means["pul"].error == pytest.approx(spread / math.sqrt(6))
        assert row.means["seconds"].value == pytest.approx(3.0)
        assert row.means["u_fid_ratio"].value == pytest.approx(row.means["u_fid"].value / 2.0)

    def test_p_values_are_of_paired_differences_and_corrected(self):
        noisy = [
            r | {"metrics": r["metrics"] | {"pul": r["metrics"]["pul"] + 0.3 * i % 1}} for i, r in enumerate(RECORDS)
        ]
        rows = {row.method: row for row in summarize(noisy)}
        puls = {m: [r["metrics"]["pul"] for r in noisy if r["method"] == m] for m in ("ours", "neg_grad", "fine_tune")}
        raw = {m: float(ttest_rel(puls[m], puls["ours"]).pvalue) for m in ("neg_grad", "fine_tune")}
        assert {m: rows[m].p_values["pul"] for m in raw} == pytest.approx(holm(raw))
        assert rows["ours"].p_values["pul"] is None

    def test_equal_runs_differ_from_ours_by_chance_at_most(self):
        twins = [r | {"method": m} for r in RECORDS[:6] for m in ("ours", "twin")]
        rows = {row.method: row for row in summarize(twins)}
        assert rows["twin"].p_values == {"pul": 1.0, "u_fid": 1.0}

    def test_one_run_has_no_error_and_no_p_value(self):
        rows = {row.method: row for row in summarize([RECORDS[0], RECORDS[6]])}
        assert rows["neg_grad"].means["pul"].error is None
        assert rows["neg_grad"].p_values["pul"] is None

    def test_holm(self):
        assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
        assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})
        assert holm({}) == {}

    def test_csv(self):
        lines = list(csv.DictReader(io.StringIO(table_csv(summarize(RECORDS)))))
        assert [line["method"] for line in lines] == ["ours", "neg_grad", "fine_tune", "before", "oracle", "floor"]
        ours, before, floor = lines[0], lines[3], lines[5]
        assert float(ours["u_fid_mean"]) == pytest.approx(2.2 * (1 + 0.1 + 0.075), rel=1e-5)
        assert float(ours["evaluations_mean"]) == 1000
        assert float(lines[1]["p_u_fid"]) < 1e-6
        assert (float(before["pul_mean"]), float(before["u_fid_mean"]), before["runs"]) == (0.0, 5.0, "2")
        assert (float(floor["u_fid_mean"]), floor["pul_mean"], floor["seconds_mean"]) == (0.5, "96", "")

    def test_markdown(self):
        text = table_markdown(summarize(RECORDS), RECORDS)
        assert "Classes c0, c3; 3 seeds; 24 samples of 3 steps of DDIM, seed 1." in text
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == 1
        assert "| **OURS** | forget data | 95.5 ± 1.0 | 2.59 ± 0.11 | 1.29 ± 0.05 | " in text
        assert "| NEG_GRAD | forget data | 97.5 ± 1.0 | 105.8 ± 4.5 | " in text

    def test_what_a_run_could_not_measure_is_left_out(self):
        lacking = RECORDS[0] | {"metrics": {**RECORDS[0]["metrics"], "shares": {}, "recall": {"before": 0.5}}}
        rows = {row.method: row for row in summarize([lacking])}
        assert rows["ours"].means["least_kept"] is None
        assert rows["ours"].means["recall"] is None
        assert rows["oracle"].means["recall"] is None
        assert rows["floor"].means["pul"].value == 96.0

    def test_files(self, tmp_path):
        write_comparison(tmp_path, RECORDS)
        assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "table.md", "tradeoff.png"}
        assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


ASKED = [
    RECORDS[0] | {"persistence": persistence(12.0, [2, 8, 20])},
    RECORDS[1] | {"persistence": persistence(None, [0, 2, 4])},
    RECORDS[6] | {"persistence": persistence(3.0, [5, 30, 90], 0.8)},
]


class TestPersistence:
    def test_a_half_life_beyond_the_steps_counts_as_all_of_them(self):
        rows = {row.method: row for row in summarize(ASKED)}
        assert rows["ours"].means["half_life"].value == pytest.approx((12 + 40) / 2)
        assert rows["ours"].means["half_life_unrelated"].value == 40
        assert rows["neg_grad"].means["membership"].value == pytest.approx(0.8)
        assert rows["before"].means["inversion"].value == pytest.approx(0.98)
        assert rows["before"].means["membership"].value == pytest.approx(0.7)
        assert rows["before"].means["half_life"] is None
        assert rows["oracle"].means["inversion"] is None

    def test_columns_are_there_when_they_were_asked_for(self):
        text = table_markdown(summarize(ASKED), ASKED)
        assert "| half back after | by itself after | from its noise | membership |" in text
        assert "Adam (0.0001) on 8 images of the class" in text
        assert "40 stands for that many or more" in text
        assert "half back after" not in table_markdown(summarize(RECORDS), RECORDS)
        lines = list(csv.DictReader(io.StringIO(table_csv(summarize(ASKED)))))
        assert float(lines[1]["half_life_mean"]) == 3
        assert float(lines[1]["inversion_mean"]) == 0.25

    def test_the_curves_are_means_over_the_runs(self):
        figure = draw_persistence(ASKED, {"ours": ("*", "#0072B2"), "neg_grad": ("s", "#E69F00")})
        forget, unrelated = figure.axes
        assert list(forget.lines[0].get_ydata()) == pytest.approx([0.05, 0.25, 0.6])
        assert list(forget.lines[1].get_ydata()) == pytest.approx([0.25, 1.5, 4.5])
        assert list(unrelated.lines[0].get_ydata()) == pytest.approx([0, 0.05, 0.1])
        assert [label.get_text() for label in forget.get_xticklabels()] == ["0", "10", "40"]

    def test_the_picture_is_written_beside_the_others(self, tmp_path):
        write_comparison(tmp_path, ASKED)
        assert (tmp_path / "persistence.png").read_bytes().startswith(b"\x89PNG")


class TestCommand:
    @pytest.fixture
    def compare(self, model, tmp_path, capsys):
        """Run the command with tiny measurements; exit code, standard output, standard error."""

        def call(**changes: object) -> tuple[int, str, str]:
            flags = {
                "data": tmp_path / "shades.npz", "forget": "0", "methods": "neg_grad", "seeds": 1, "samples": 24,
                "sampler_steps": 3, "loss_images": 8, "loss_timesteps": 2, "model": model, "output": tmp_path / "out",
                "device": "cpu", **changes,
            }  # fmt: skip
            words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
            capsys.readouterr()
            return main(["compare", *words]), *capsys.readouterr()

        return call

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": "ours,sallun"}, "--methods: there is no 'sallun'; choose among ours, vdu"),
            ({"methods": ","}, "--methods names nothing"),
            ({"seeds": 0}, "--seeds must be at least 1, got 0"),
            ({"jobs": 0}, "--jobs must be at least 1, got 0"),
            ({"model": None}, "--model is missing: only for --data digits"),
            ({"posterior": "none.safetensors"}, "--posterior: none.safetensors does not exist"),
            ({"data": "nowhere"}, "--data"),
            ({"data": "digits", "forget": "0,eleven"}, "eleven"),
            ({"data": "digits", "methods": "retrain"}, "--methods: retrain needs the pretrain.json"),
            ({"samples": 1}, "samples: got 1"),
            ({"persistence": "true", "relearn_steps": "[5,10]"}, "relearn_steps: got [5, 10]; accepted are 0 and then"),
            ({"persistence": "true", "relearn_steps": "soon"}, "--relearn_steps"),
            ({"persistence": "maybe"}, "--persistence"),
        ],
    )
    def test_bad_input_is_named_by_its_flag(self, compare, changes, message):
        code, _, error = compare(**changes)
        assert code == 2
        assert message in error
        assert "Traceback" not in error

    def test_from_data_to_table(self, compare, comparison, tmp_path, monkeypatch):
        label, data = drawn(comparison), comparison.train
        pixels = torch.cat([data.images, comparison.heldout.images])[:, 0]
        labels = torch.cat([data.labels, comparison.heldout.labels])
        numpy.savez(tmp_path / "shades.npz", images=pixels.numpy(), labels=labels.numpy())
        code, out, error = compare(forget=f"{label},{label}", threads=1)
        assert code == 0, error
        assert "NegGrad" in out
        assert (tmp_path / "out" / "table.csv").is_file()
        assert not (tmp_path / "out" / "persistence.png").exists()
        asking = {"persistence": "true", "relearn_steps": "[0,1]", "relearn_samples": 20, "inverted_images": 4}
        code, out, error = compare(forget=label, threads=1, **asking)
        assert code == 0, error
        assert "half back after" in out
        assert (tmp_path / "out" / "persistence.png").is_file()
        monkeypatch.setattr(Comparison, "run", None)  # all is finished
        assert compare(forget=label)[0] == 0
        assert not (tmp_path / "out" / "persistence.png").exists()
        assert compare(forget=label, **asking)[0] == 0

    def test_every_method_is_a_default_but_retraining_without_its_recipe(self, model):
        assert _methods("all", model) == [name for name in METHOD_NAMES if name != "retrain"]
        assert _methods("all", shipped_model()) == list(METHOD_NAMES)
