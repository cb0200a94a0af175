"""Killed, interrupted, resumed: the weights equal those of a run that was left alone, bit for bit."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import build_pipeline, random_posterior

import vdu_fast
from vdu_fast.cli import main
from vdu_fast.pretrain import STATE_FILE as PRETRAIN_STATE
from vdu_fast.unlearner import STATE_FILE as UNLEARN_STATE

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(vdu_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
PATIENCE = 120  # seconds, for a machine that is busy with other things


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pretrain_command(output: Path) -> list[str]:
    flags = "--data digits --steps 90 --anneal_steps 10 --warmup_steps 5 --checkpoints 3 --channels [8] --batch_size 8"
    return ["pretrain", *flags.split(), "--save_every", "3", "--threads", "1", "--output", str(output)]


@pytest.fixture
def unlearn_command(tmp_path) -> Callable[[Path], list[str]]:
    model = tmp_path / "model"
    pipeline = build_pipeline()
    pipeline.save_pretrained(str(model))
    random_posterior(pipeline.unet).save(model / "posterior.safetensors")
    flags = (
        f"--model {model} --posterior {model}/posterior.safetensors --forget digits:3 --steps 100 --batch_size 8 "
        "--replay_batch_size 8 --replay_samples 24 --replay_sampler_steps 4 --replay_states 2 --check_every 5 "
        "--check_size 8 --rollback --family mean_field --learn_std --save_every 3 --threads 1"
    )
    return lambda output: ["unlearn", *flags.split(), "--output", str(output)]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vdu_fast.cli", *command], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process: subprocess.Popen[str], state: Path, step: int) -> None:
    """Return when the saved state has reached a step and the run is still going."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        if state.is_file():
            with safe_open(str(state), framework="pt") as file:
                if int(file.get_tensor("step")) >= step:
                    return
        time.sleep(0.005)
    raise AssertionError(f"{state} did not reach step {step} in {PATIENCE} s")


def end_with(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal, wait for the end, and return what was said on stderr."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_pretraining_resumes_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(pretrain_command(broken))
    wait_for_step(process, broken / PRETRAIN_STATE, 6)
    end_with(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "model_index.json").exists()

    assert main([*pretrain_command(broken), "--resume"]) == 0
    assert main(pretrain_command(whole)) == 0
    assert_equal_weights(whole, broken)
    posteriors = [load_file(folder / "posterior.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(posteriors[0][name], posteriors[1][name]) for name in posteriors[0])
    assert not (broken / "resume").exists()


def test_killed_unlearning_resumes_bit_for_bit(tmp_path, unlearn_command):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(unlearn_command(broken))
    wait_for_step(process, broken / UNLEARN_STATE, 6)
    end_with(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "model_index.json").exists()

    assert main([*unlearn_command(broken), "--resume"]) == 0
    assert main(unlearn_command(whole)) == 0
    assert_equal_weights(whole, broken)
    assert not (broken / "resume").exists()


def test_resume_refuses_other_settings(tmp_path, unlearn_command, capsys):
    output = tmp_path / "out"
    process = start(unlearn_command(output))
    wait_for_step(process, output / UNLEARN_STATE, 3)
    end_with(process, signal.SIGKILL)
    assert main([*unlearn_command(output), "--resume", "--gamma", "0.3"]) == 2
    assert "another model, posterior, forget data or settings" in capsys.readouterr().err
    assert main(unlearn_command(output)) == 2
    assert "--resume goes on" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pretrain", "unlearn"])
def test_interrupted_run_says_how_to_go_on(tmp_path, unlearn_command, kind):
    make, state = (pretrain_command, PRETRAIN_STATE) if kind == "pretrain" else (unlearn_command, UNLEARN_STATE)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start([*make(broken), "--overwrite"])
    wait_for_step(process, broken / state, 3)
    said = end_with(process, signal.SIGINT)
    assert process.returncode == 130
    assert "Traceback" not in said
    resume = shlex.split(said.strip().splitlines()[-1])
    assert resume == ["vdu-fast", *make(broken), "--resume"]
    assert main(resume[1:]) == 0
    assert main(make(whole)) == 0
    assert_equal_weights(whole, broken)
