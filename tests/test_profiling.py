"""The profile: true to the run, harmless to the model, and readable in all its files."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import re
import time

import pytest
import torch
from PIL import Image
from tiny import build_pipeline, build_tiny, random_posterior

from vdu_fast.checkpoint import fingerprint
from vdu_fast.cli import main
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.machine import cores, device_name, has_bfloat16
from vdu_fast.phases import PREFIX, PhaseRecorder
from vdu_fast.pipelines import denoiser_of
from vdu_fast.profiling import profile, replay_costs
from vdu_fast.profiling.measuring import STEP
from vdu_fast.profiling.report import save_profile
from vdu_fast.replay import build_bank
from vdu_fast.unlearner import unlearn

SMALL = {
    "steps": 40, "batch_size": 8, "replay_batch_size": 6, "replay_samples": 100, "replay_sampler_steps": 8,
    "replay_states": 2, "check_every": 10, "check_size": 16, "inference_batch_size": 16, "bank_filter": "none",
}  # fmt: skip
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
TINY = ["--profile_steps", "2", "--profile_warmup", "1", *FLAGS]


def small(**settings) -> UnlearnConfig:
    return UnlearnConfig(**(SMALL | settings))


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found():
    pipeline = build_pipeline()
    images = torch.rand((12, 1, 8, 8), generator=torch.Generator().manual_seed(3)) * 2 - 1
    settings = small(bank_filter="positive_unlabelled")
    return profile(pipeline, images, posterior=random_posterior(pipeline.unet), config=settings, steps=3, warmup=1)


class TestProfile:
    def test_phases_of_a_step(self, found):
        names = [row.name for row in found.phases]
        assert names == ["data", "weights", "forward", "loss", "backward", "update", "check", STEP]
        assert sum(row.share for row in found.phases) == pytest.approx(1)
        assert all(0 < row.low <= row.seconds <= row.high for row in found.phases)
        assert found.seconds_of("check") == pytest.approx(found.check / 10)
        assert found.seconds_of("accumulate") == 0

    def test_memory_is_that_of_the_activations(self, found):
        memory = {row.name: (row.rise, row.peak) for row in found.phases}
        states = 14 * 8 * 8 * 4  # x_t of 8 forget images and 6 replayed states, float32
        assert memory["forward"][0] > 8 * states
        assert memory["backward"][1] >= memory["forward"][1] // 2
        assert memory["update"][0] < 1000  # in place
        assert found.held["network and gradient"] == 8 * found.parameters
        assert found.held["bank"] == 4 * 100 * (1 + 2 * 2) * 64

    def test_the_run_is_extrapolated_from_what_was_measured(self, found):
        parts = {part.name: part for part in found.parts}
        assert list(parts) == ["bank", "filter", "start", "steps", "checks", "saves"]
        assert parts["steps"].seconds == pytest.approx(40 * found.step)
        assert parts["checks"].seconds == pytest.approx(4 * found.check)
        # 7 batches of 16 make 100 images; of 2 batches, 3 of the 8 sampler steps were taken.
        assert parts["bank"].basis == "6 of 56 network calls"
        assert parts["filter"].basis == "44 of 112 images"
        assert [name for name, part in parts.items() if not part.estimate] == ["start"]
        assert found.total == pytest.approx(sum(part.seconds for part in found.parts))

    def test_the_trace_has_a_step_and_a_step_with_a_check(self, found):
        events = json.loads(found.trace)["traceEvents"]
        marks = [event["name"].removeprefix(PREFIX) for event in events if event.get("cat") == "user_annotation"]
        assert (marks.count(STEP), marks.count("update"), marks.count("forward")) == (2, 2, 2)
        assert marks.count("check") == 2  # the measurement, and the keeping of what it found good

    def test_guidance_is_part_of_the_filter(self, tiny_module, scheduler, images):
        settings = small(bank_filter="positive_unlabelled", feature_module="encode", replay_guidance=1.0)
        how = {"posterior": random_posterior(tiny_module), "scheduler": scheduler, "steps": 1, "warmup": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replay_costs, "guide", lambda *told, strength: time.sleep(0.05))
            filtering = profile(tiny_module, images, config=settings, **how).part("filter")
        # 100 images instead of 32, against as many.
        assert filtering.seconds > 0.05 * (100 / 32) ** 2

    def test_steps_that_only_repair_are_measured_too(self, tiny_module, scheduler, images):
        posterior, settings = random_posterior(tiny_module), small(steps=40, forget_share=0.25)
        how = {"posterior": posterior, "scheduler": scheduler, "steps": 1, "warmup": 0}
        steps = profile(tiny_module, images, config=settings, **how).part("steps")
        assert re.fullmatch(r"10 x .+ and 30 x .+", steps.basis)

    def test_without_replay_there_is_neither_bank_nor_filter(self, tiny_module, scheduler, images):
        posterior = random_posterior(tiny_module)
        settings = small(replay_weight=0.0, accumulate=2)
        found = profile(
            tiny_module, images, posterior=posterior, config=settings, scheduler=scheduler, steps=1, warmup=0
        )
        assert [part.name for part in found.parts] == ["start", "steps", "checks", "saves"]
        assert (found.samples, found.passes) == (8, 2)
        assert found.seconds_of("accumulate") > 0
        assert "bank" not in found.held

    def test_a_bank_that_is_there_is_read_and_not_extrapolated(self, pipeline, images, tmp_path):
        build_bank(denoiser_of(pipeline), 20, sampler_steps=4, states=2).save(tmp_path / "bank.safetensors")
        found = profile(
            pipeline, images, posterior=random_posterior(pipeline.unet), config=small(), steps=1, warmup=0,
            bank=tmp_path / "bank.safetensors",
        )  # fmt: skip
        bank = found.part("bank")
        assert (bank.estimate, bank.basis) == (False, "20 images read")

    def test_a_bank_that_is_not_there_is_not_written(self, pipeline, images, tmp_path):
        posterior = random_posterior(pipeline.unet)
        profile(pipeline, images, posterior=posterior, config=small(), steps=1, warmup=0, bank=tmp_path / "absent")
        assert list(tmp_path.iterdir()) == []

    def test_settings_that_would_diverge_can_be_profiled(self, tiny_module, scheduler, images):
        settings = small(replay_weight=0.0, saturation="none", learning_rate=50.0)
        posterior = random_posterior(tiny_module)
        found = profile(tiny_module, images, posterior=posterior, config=settings, scheduler=scheduler, steps=8)
        assert found.settings["learning_rate"] == 50.0

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_comes_back_bit_for_bit(self, pipeline, images, training):
        unet, scheduler = pipeline.unet, copy.deepcopy(pipeline.scheduler.config)
        unet.train(training)
        before, storage = fingerprint(unet), [parameter.data_ptr() for parameter in unet.parameters()]
        profile(pipeline, images, posterior=random_posterior(unet), config=small(), steps=1, warmup=1)
        assert fingerprint(unet) == before
        assert [parameter.data_ptr() for parameter in unet.parameters()] == storage
        assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())
        assert unet.training == training
        assert pipeline.scheduler.config == scheduler

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"steps": 0}, "--profile_steps"),
            ({"warmup": -1}, "--profile_warmup"),
            ({"bank": "."}, "--bank . is a folder"),
        ],
    )
    def test_mistakes_are_named(self, pipeline, images, changes, expected):
        with pytest.raises(InputError, match=expected):
            profile(pipeline, images, posterior=random_posterior(pipeline.unet), config=small(), **changes)

    def test_a_pipeline_that_cannot_be_used_has_its_name_in_the_message(self, images):
        with pytest.raises(InputError, match="dict has no unet"):
            profile({}, images, posterior=random_posterior(build_tiny()))


@pytest.mark.parametrize("settings", [{}, {"saturation": "npo"}, {"family": "mean_field", "samples_per_step": 2}])
def test_a_recorded_run_ends_with_the_weights_of_one_that_is_not(images, settings):
    results = []
    for recorded in (False, True):
        pipeline, recorder = build_pipeline(), PhaseRecorder()
        run = {"posterior": random_posterior(pipeline.unet), "config": small(steps=6, check_every=3, **settings)}
        if recorded:
            with recorder.recording():
                result = unlearn(pipeline, images, **run)
            assert {"bank", "filter", "start", "forward", "backward", "update", "check"} <= recorder.take().keys()
        else:
            result = unlearn(pipeline, images, **run)
        results.append((fingerprint(pipeline.unet), result.history))
    assert results[0] == results[1]


class TestFiles:
    def test_every_file_is_readable_and_holds_the_figures(self, found, tmp_path):
        save_profile(found, tmp_path, ["Rest."])
        record = json.loads((tmp_path / "profile.json").read_text())
        assert record["advice"] == ["Rest."]
        assert record["settings"]["replay_samples"] == 100
        with (tmp_path / "profile.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows if row["of"] == "step"] == [row["name"] for row in record["phases"]]
        for kind in ("step", "run"):
            assert math.isclose(sum(float(row["share"]) for row in rows if row["of"] == kind), 1, rel_tol=1e-6)
        with Image.open(tmp_path / "profile.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
        assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

    def test_a_device_that_tells_nothing_of_its_memory_has_times_alone(self, found, tmp_path):
        phases = [dataclasses.replace(row, peak=None, rise=None) for row in found.phases]
        save_profile(dataclasses.replace(found, phases=phases), tmp_path, [])
        assert ",,,False," in (tmp_path / "profile.csv").read_text()
        assert (tmp_path / "profile.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipeline = build_pipeline()
    pipeline.save_pretrained(str(folder))
    random_posterior(pipeline.unet).save(folder / "posterior.safetensors")
    return folder


class TestCommand:
    def test_a_folder_model(self, model, tmp_path, capfd):
        where = ["--model", str(model), "--forget", "digits:3", "--output", str(tmp_path / "out")]
        for _ in range(2):  # an earlier profile is replaced
            assert main(["profile", *where, *TINY]) == 0
        out, err = capfd.readouterr()
        for text in ("network forward", "regularizer + update", "replay bank", "unlearning adds", "10,289 parameters"):
            assert text in out
        assert "CPUAllocator" not in err
        assert "profiler" not in err
        names = ["profile.csv", "profile.json", "profile.png", "trace.json"]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names

    def test_without_arguments_it_is_the_shipped_model(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["profile", "--quiet", *TINY]) == 0
        assert "651,041 parameters" in capsys.readouterr().out
        settings = json.loads((tmp_path / "vdu-fast-profile" / "profile.json").read_text())["settings"]
        assert settings["batch_size"] == 8

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (["--profile_steps", "0"], "--profile_steps"),
            (["--model", "absent", "--forget", "digits:3"], "--model absent does not exist"),
            (["--model", "MODEL"], "--model needs --forget"),
            (["--model", "EMPTY", "--forget", "digits:3"], "--posterior was not given"),
            (["--forget", "absent"], "--forget"),
            (["--posterior", "absent.safetensors"], "absent.safetensors does not exist"),
            (["--gamma", "2"], "gamma must be in [0, 1)"),
            (["--output", "EMPTY"], "--overwrite"),
            (["--bank_filter", "classifier"], "--filter_classifier"),
            (["--forget_label", "3"], "--bank_filter classifier"),
        ],
    )
    def test_mistakes_are_refused(self, model, tmp_path, capsys, flags, expected):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "something").touch()
        places = {"MODEL": str(model), "EMPTY": str(tmp_path / "empty")}
        output = [] if "--output" in flags else ["--output", str(tmp_path / "out")]
        assert main(["profile", *output, *TINY, *(places.get(word, word) for word in flags)]) == 2
        err = capsys.readouterr().err
        assert expected in err
        assert "Traceback" not in err


class TestMachine:
    def test_bfloat16_is_read_off_the_flags(self, tmp_path, monkeypatch):
        cpuinfo = tmp_path / "cpuinfo"
        monkeypatch.setattr("vdu_fast.machine.CPUINFO", cpuinfo)
        cpu = torch.device("cpu")
        assert not has_bfloat16(cpu)  # no such file
        for flags, expected in (("fpu avx512f", False), ("fpu avx512_bf16", True), ("amx_bf16", True)):
            cpuinfo.write_text(
                f"model name\t: Some CPU\nflags\t\t: {flags}\n\nmodel name\t: another\nflags\t: avx512_bf16\n"
            )
            assert has_bfloat16(cpu) == expected
        assert device_name(cpu) == "Some CPU"
        cpuinfo.write_text("Features\t: fp asimd bf16\n")
        assert has_bfloat16(cpu)

    def test_there_is_a_core(self):
        assert cores() >= 1
