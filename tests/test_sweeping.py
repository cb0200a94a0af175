"""Sweeps on a model of a few thousand weights: the signals tell what they claim, and no setting is run twice."""

from __future__ import annotations

import csv
import json
import logging
import re
import shlex
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tiny import build_pipeline, build_tiny, random_posterior
from torch import Tensor

from vdu_fast import guidance
from vdu_fast.checkpoint import fingerprint
from vdu_fast.cli import main
from vdu_fast.cli.parser import take
from vdu_fast.cli.unlearn import build_parser
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.pipelines import denoiser_of
from vdu_fast.sweeping import Point, Setting, Sweep, SweepConfig, SweepResult, choose, sweep
from vdu_fast.sweeping.choice import frontier
from vdu_fast.sweeping.report import FILES, draw_curve, settings_yaml, write_sweep
from vdu_fast.sweeping.signals import Signals
from vdu_fast.unlearner import unlearn

GRID = SweepConfig([4.0, 8.0], [2.0], [0.05], step_counts=[2, 5], samples=16, sampler_steps=4)
# What the settings of GRID are called after their lambda.
REST = "hinge-2-gamma-0.05-share-1-guidance-0"
SCHEDULER = DDPMScheduler(num_train_timesteps=50)


def small(**settings) -> UnlearnConfig:
    defaults = {"batch_size": 6, "replay_batch_size": 6, "check_every": 2, "check_size": 16, "learning_rate": 0.2}
    bank = {"replay_samples": 16, "replay_sampler_steps": 6, "replay_states": 3, "bank_filter": "none"}
    return UnlearnConfig(**(defaults | bank | settings))


def sweep_tiny(images: Tensor, output, model=None, **options) -> SweepResult:
    pipeline = model if model is not None else build_pipeline()
    options = {"posterior": random_posterior(build_pipeline().unet), "config": small(), "grid": GRID} | options
    return sweep(pipeline, images, output=output, **options)


def point(pul: float, ratio: float, steps: int = 100, weight: float = 8.0) -> Point:
    return Point(weight, 3.0, 0.05, 0.5, 1.0, steps, 1, 30, pul, 2 * ratio, ratio, 0.001, 3.0)


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """The names of the settings that are run from now on."""
    made, run = [], Sweep.run
    monkeypatch.setattr(Sweep, "run", lambda self, setting: (made.append(setting.name), run(self, setting))[1])
    return made


class TestGrid:
    def test_every_combination_once(self):
        grid = SweepConfig([8.0, 4.0, 8.0], [2.0, 3.0], [0.05], [0.5, 1.0], [1.0, 0.0], [100, 50])
        assert grid.settings() == [
            Setting(w, h, 0.05, s, g) for g in (0.0, 1.0) for w in (4.0, 8.0) for h in (2.0, 3.0) for s in (0.5, 1.0)
        ]
        assert grid.step_counts == [50, 100]
        assert len({setting.name for setting in grid.settings()}) == 16

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"replay_weights": []}, "--replay_weights is empty"),
            ({"replay_weights": [0.0]}, "--replay_weights must be positive"),
            ({"hinge_ratios": [float("nan")]}, "--hinge_ratios must be positive"),
            ({"gammas": [1.0]}, "--gammas must be in"),
            ({"forget_shares": [0.0]}, "--forget_shares must be above 0"),
            ({"replay_guidances": [-1.0]}, "--replay_guidances must be finite and 0 or more"),
            ({"step_counts": [0, 50]}, "--step_counts must be at least 1"),
            ({"least_forgotten": 0.98 - 1}, "--least_forgotten is a percentage"),
            ({"samples": 4}, "--samples must be at least 8"),
            ({"sampler_steps": 0}, "--sampler_steps must be at least 1"),
        ],
    )
    def test_bad_values_are_refused_by_the_name_of_their_flag(self, settings, expected):
        with pytest.raises(InputError, match=expected):
            SweepConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"target_ratio": 2.0}, "--target_ratio ends a run elsewhere"),
            ({"rollback": True}, "--rollback ends a run elsewhere"),
            ({"forget_share": 0.5}, r"name them there, as in --forget_shares \[0.5\]"),
            ({"bank_filter": "classifier"}, "--bank_filter classifier: a sweep takes no classifier"),
            ({"saturation": "npo"}, "--hinge_ratios .* would all be the same run"),
            ({"bank_filter": "none"}, "--replay_guidances .* nothing tells what is unwanted"),
        ],
    )
    def test_settings_that_cannot_be_swept_are_refused(self, images, tmp_path, settings, expected):
        grid = replace(GRID, hinge_ratios=[2.0, 3.0], replay_guidances=[0.0, 1.0])
        config = small(**{"bank_filter": "positive_unlabelled"} | settings)
        with pytest.raises(InputError, match=expected):
            sweep_tiny(images, tmp_path / "out", config=config, grid=grid)
        assert not (tmp_path / "out").exists()


class TestChoice:
    def test_the_least_distance_of_those_that_forget_enough(self):
        points = [point(100.0, 1.6), point(96.0, 1.2), point(95.0, 1.3), point(94.9, 1.0)]
        assert choose(points, 95.0) == (points[1], True)
        assert choose(points, 99.0) == (points[0], True)

    def test_the_most_forgotten_where_none_forgets_enough(self):
        points = [point(80.0, 1.6), point(80.0, 1.2), point(60.0, 1.0)]
        assert choose(points, 95.0) == (points[1], False)

    def test_fewer_steps_where_all_else_is_equal(self):
        points = [point(97.0, 1.2, steps=100), point(97.0, 1.2, steps=50)]
        assert choose(points, 95.0)[0].steps == 50
        assert choose(points, 99.0)[0].steps == 50

    def test_the_frontier_leaves_out_what_another_beats_in_both(self):
        points = [point(90.0, 1.0), point(95.0, 1.3), point(92.0, 1.4), point(100.0, 1.5), point(100.0, 1.7)]
        assert frontier(points) == [points[0], points[1], points[3]]


N = 100
LEFT = torch.arange(4 * N) % 5 == 0
NONE = torch.zeros(N, dtype=torch.bool)


def pictures(left: Tensor, seed: int) -> Tensor:
    """Pictures bright on the left, where `left` says so, or on the right; the left ones are to be forgotten."""
    noise = 0.2 * torch.randn((len(left), 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    ramp = torch.linspace(0.6, -0.6, 8).expand(8, 8)
    return (torch.where(left[:, None, None, None], ramp, -ramp) + noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def signals() -> Signals:
    return Signals(denoiser_of(build_pipeline()), pictures(LEFT, 1), pictures(LEFT[::5], 2), samples=N)


class TestSignals:
    def test_the_forgotten_are_counted(self, signals):
        kinds = LEFT[:N]
        same = signals.measure(pictures(kinds, 3))
        none = signals.measure(pictures(NONE, 3))
        half = signals.measure(pictures(kinds & (torch.arange(N) < N // 2), 3))
        assert abs(same["forgotten"] - int(kinds.sum())) <= 3
        assert abs(same["pul"]) <= 15
        assert (none["forgotten"], none["pul"]) == (0, 100)
        assert 40 <= half["pul"] <= 60

    def test_what_was_lost_is_seen_and_what_was_forgotten_is_no_loss(self, signals):
        clean = pictures(NONE, 3)
        noise = 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
        ratios = [signals.measure(x)["ratio"] for x in (clean, pictures(LEFT[:N], 3), (clean + noise).clamp(-1, 1))]
        assert 0.5 < ratios[0] < 1.5
        assert ratios[1] > 2 * ratios[0]
        assert ratios[2] > 2 * ratios[0]

    def test_a_model_that_never_draws_it_is_refused(self):
        with pytest.raises(InputError, match="0 look like them"):
            Signals(denoiser_of(build_pipeline()), pictures(LEFT & ~LEFT, 1), -(pictures(NONE, 2) ** 3), samples=N)

    def test_few_forgotten_are_warned_of(self, caplog):
        with caplog.at_level(logging.WARNING):
            Signals(denoiser_of(build_pipeline()), pictures(LEFT[:80], 1), pictures(LEFT[::5], 2), samples=20)
        assert "--samples" in caplog.text


class TestSweep:
    @pytest.mark.parametrize(
        ("settings", "swept"),
        [
            ({}, {}),
            ({"anneal": 0.0}, {"forget_shares": [0.4]}),
            (
                {"bank_filter": "positive_unlabelled", "replay_samples": 60},
                {"replay_weights": [4.0], "replay_guidances": [0.0, 1.0]},
            ),
        ],
    )
    def test_a_point_is_what_unlearn_ends_with_bit_for_bit(self, images, tmp_path, monkeypatch, settings, swept):
        """The annealed copies of one trunk are runs of their own lengths."""
        monkeypatch.setattr(guidance, "FEWEST_IMAGES", 2.0)
        weights = {}
        draw = Sweep._draw

        def watch(self, denoiser, count):
            if denoiser is not self.original:
                weights[len(weights)] = fingerprint(denoiser.module)
            return draw(self, denoiser, count)

        monkeypatch.setattr(Sweep, "_draw", watch)
        grid = replace(GRID, **swept)
        result = sweep_tiny(images, tmp_path, config=small(**settings), grid=grid)
        assert [(p.setting, p.steps) for p in result.points] == list(product(grid.settings(), [2, 5]))
        assert len(set(weights.values())) == len(weights)
        for number, measured in enumerate(result.points):
            pipeline = build_pipeline()
            config = measured.setting.applied(small(**settings), measured.steps)
            unlearn(pipeline, images, posterior=random_posterior(pipeline.unet), config=config, bank=result.bank)
            assert fingerprint(pipeline.unet) == weights[number]

    @pytest.mark.parametrize("family", ["mean_only", "mean_field"])
    def test_the_model_comes_back_as_it_was(self, images, tmp_path, family):
        pipeline = build_pipeline().to("cpu")
        pipeline.unet.train()
        before, storage = fingerprint(pipeline.unet), [p.data_ptr() for p in pipeline.unet.parameters()]
        sweep_tiny(images, tmp_path, model=pipeline, config=small(family=family))
        assert fingerprint(pipeline.unet) == before
        assert [p.data_ptr() for p in pipeline.unet.parameters()] == storage
        assert all(p.requires_grad and p.grad is None for p in pipeline.unet.parameters())
        assert pipeline.unet.training

    def test_a_bare_module_with_a_scheduler(self, images, tmp_path):
        result = sweep_tiny(
            images, tmp_path, model=build_tiny(), scheduler=SCHEDULER, posterior=random_posterior(build_tiny()),
            config=small(feature_module="encode"),
        )  # fmt: skip
        assert len(result.points) == 4

    def test_the_same_seed_finds_the_same_and_another_noise_something_else(self, images, tmp_path):
        first, again = (sweep_tiny(images, tmp_path / name) for name in "ab")
        other = sweep_tiny(images, tmp_path / "c", grid=replace(GRID, sample_seed=1))
        assert first.points == again.points
        assert first.points != other.points

    def test_a_sweep_goes_on_where_it_was(self, images, tmp_path, runs):
        def stop(done: int, total: int, text: str) -> None:
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sweep_tiny(images, tmp_path, progress=stop)
        texts = []
        result = sweep_tiny(images, tmp_path, progress=lambda *report: texts.append(report))
        assert runs == [setting.name for setting in GRID.settings()]
        assert [text[:2] for text in texts] == [(1, 2), (2, 2)]
        assert result.points == sweep_tiny(images, tmp_path / "whole").points

    def test_only_what_is_new_is_run(self, images, tmp_path, runs):
        sweep_tiny(images, tmp_path)
        runs.clear()
        sweep_tiny(images, tmp_path, grid=replace(GRID, least_forgotten=50.0))
        assert runs == []
        sweep_tiny(images, tmp_path, grid=replace(GRID, replay_weights=[4.0, 6.0, 8.0]))
        assert runs == [f"lambda-6-{REST}"]

    @pytest.mark.parametrize("what", ["images", "config", "samples", "posterior", "model"])
    def test_other_inputs_are_run_anew(self, images, tmp_path, runs, what):
        sweep_tiny(images, tmp_path)
        runs.clear()
        options = {
            "config": {"config": small(seed=1)},
            "samples": {"grid": replace(GRID, samples=17)},
            "posterior": {"posterior": random_posterior(build_pipeline().unet, seed=6)},
        }.get(what, {})
        if what == "model":
            options["model"] = build_pipeline()
            next(options["model"].unet.parameters()).data.mul_(1.1)
        sweep_tiny(-images if what == "images" else images, tmp_path, **options)
        assert len(runs) == 2

    def test_a_setting_that_diverges_does_not_end_the_sweep(self, images, tmp_path, monkeypatch):
        run = Sweep.states

        def diverging(self, setting):
            if setting.replay_weight == 4.0:
                raise InputError("the loss became nan")
            yield from run(self, setting)

        monkeypatch.setattr(Sweep, "states", diverging)
        result = sweep_tiny(images, tmp_path)
        assert {p.replay_weight for p in result.points} == {8.0}
        assert result.failed == {f"lambda-4-{REST}": "the loss became nan"}
        with pytest.raises(InputError, match="every setting failed, the first one so: the loss became nan"):
            sweep_tiny(images, tmp_path / "all", grid=replace(GRID, replay_weights=[4.0]))

    def test_a_bank_that_is_too_small_ends_the_sweep(self, images, tmp_path):
        config = small(bank_filter="positive_unlabelled", replay_batch_size=16)
        with pytest.raises(InputError, match="the filter left 8 of 16 replayed images"):
            sweep_tiny(images, tmp_path, config=config)
        assert not (tmp_path / "settings").exists()

    def test_guidance_that_tells_nothing_does_not_end_the_sweep(self, images, tmp_path):
        config = small(bank_filter="positive_unlabelled", replay_samples=60)
        result = sweep_tiny(images, tmp_path, config=config, grid=replace(GRID, replay_guidances=[0.0, 1.0]))
        assert {point.replay_guidance for point in result.points} == {0.0}
        assert len(result.failed) == 2
        assert all("lie too far apart" in why for why in result.failed.values())

    def test_a_damaged_record_is_named(self, images, tmp_path):
        sweep_tiny(images, tmp_path)
        (tmp_path / "settings" / f"lambda-4-{REST}.json").write_text("{")
        with pytest.raises(InputError, match=rf"lambda-4-{re.escape(REST)}\.json is not readable"):
            sweep_tiny(images, tmp_path)


class TestReport:
    def result(self, **config) -> SweepResult:
        points = [point(90.0, 1.0, weight=8.0), point(100.0, 1.5, weight=4.0), point(96.0, 1.2, weight=4.0)]
        found = points[2].setting.applied(UnlearnConfig(**config), points[2].steps)
        return SweepResult(points, points[2], True, found, "bank.safetensors", {})

    def test_unlearn_takes_the_settings_file(self, tmp_path):
        given = {"learning_rate": 1e-5, "timestep_window": (5, 40), "trainable": ["mid_block*"], "channels_last": True}
        result = self.result(**given)
        (tmp_path / "settings.yaml").write_text(settings_yaml(result))
        required = ["--model", "m", "--posterior", "p", "--forget", "f", "--output", "o"]
        parsed = build_parser().parse_args([*required, "--config", str(tmp_path / "settings.yaml")])
        assert asdict(take(UnlearnConfig, parsed)) == asdict(result.config)
        assert (parsed.replay_weight, parsed.steps) == (4.0, 100)

    def test_the_files_hold_all_points_and_mark_the_chosen_one(self, tmp_path):
        result = self.result()
        write_sweep(tmp_path, result, SweepConfig())
        assert {path.name for path in tmp_path.iterdir()} == set(FILES)
        rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
        assert [(float(row["pul"]), row["chosen"]) for row in rows] == [(90, "0"), (100, "0"), (96, "1")]
        record = json.loads((tmp_path / "sweep.json").read_text())
        assert record["chosen"] == asdict(result.chosen)
        assert len(record["points"]) == 3
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    def test_the_picture_has_a_line_per_lambda_and_names_the_choice(self):
        labels = [text.get_text() for text in draw_curve(self.result(), SweepConfig()).legends[0].get_texts()]
        assert "lambda 4" in labels
        assert "lambda 8" in labels
        assert any(label.startswith("chosen: lambda 4, hinge 3") for label in labels)


class TestCommand:
    @pytest.fixture
    def arguments(self, tmp_path) -> list[str]:
        pipeline = build_pipeline()
        pipeline.save_pretrained(str(tmp_path / "model"))
        random_posterior(pipeline.unet).save(tmp_path / "posterior.safetensors")
        (tmp_path / "forget").mkdir()
        for number in range(10):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "forget" / f"{number}.png")
        files = {name: tmp_path / name for name in ("model", "forget")} | {"output": tmp_path / "out"}
        files["posterior"] = tmp_path / "posterior.safetensors"
        grid = {"replay_weights": "[4]", "hinge_ratios": "[2]", "gammas": "[0.05]", "step_counts": "[2]"}
        grid |= {"samples": 16, "sampler_steps": 4, "least_forgotten": 100}
        shared = {name: value for name, value in asdict(small()).items() if value != getattr(UnlearnConfig(), name)}
        flags = files | grid | shared
        return ["sweep", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--quiet"]

    def test_the_printed_command_unlearns_with_what_was_found(self, arguments, tmp_path, capsys):
        assert main(arguments) == 0
        printed, err = capsys.readouterr()
        assert "warning: no setting reached an estimated PUL of 100" in err
        assert {path.name for path in (tmp_path / "out").iterdir()} >= set(FILES)
        command = shlex.split(printed.splitlines()[-1])
        assert command[0] == "vdu-fast"
        command[command.index("DIR")] = str(tmp_path / "clean")
        assert main([*command[1:], "--quiet"]) == 0
        record = json.loads((tmp_path / "clean" / "unlearn.json").read_text())
        assert record["settings"] == json.loads((tmp_path / "out" / "sweep.json").read_text())["settings"]
        assert record["seconds"].keys() == {"filter", "steps", "unlearn"}  # the bank was there

    def test_a_second_call_runs_nothing(self, arguments, tmp_path, capsys, runs):
        assert main(arguments) == 0
        first = (tmp_path / "out" / "sweep.json").read_bytes()
        assert len(runs) == 1
        assert main(arguments) == 0
        assert len(runs) == 1
        assert (tmp_path / "out" / "sweep.json").read_bytes() == first

    def test_an_interrupted_one_says_that_it_goes_on(self, arguments, capsys, monkeypatch):
        def interrupted(self, setting):
            raise KeyboardInterrupt

        monkeypatch.setattr(Sweep, "run", interrupted)
        assert main(arguments) == 130
        assert "the same command goes on" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flag", "value", "expected"),
        [
            ("--steps", "5", "unrecognized arguments: --steps"),
            ("--step_counts", "five", "--step_counts"),
            ("--sampler_steps", "51", "--sampler_steps"),
            ("--gammas", "[2]", "--gammas must be in"),
        ],
    )
    def test_wrong_flags(self, arguments, flag, value, expected, capsys):
        assert main([*arguments, flag, value]) == 2
        assert expected in capsys.readouterr().err

    def test_the_models_own_folder_is_no_output(self, arguments, tmp_path, capsys):
        arguments[arguments.index("--output") + 1] = str(tmp_path / "model")
        assert main(arguments) == 2
        assert "--output" in capsys.readouterr().err
