"""The command line as a user meets it: settings, the four commands in a row, and an answer to every bad input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build_pipeline, random_posterior

import vdu_fast
from vdu_fast.checkpoint import fingerprint
from vdu_fast.classifier import ImageClassifier
from vdu_fast.cli import COMMANDS, main
from vdu_fast.cli.evaluate import _judged_by_its_filter
from vdu_fast.config import UnlearnConfig
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.persistence import PersistenceConfig
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.pretrain import PretrainConfig
from vdu_fast.sampling import sample_images
from vdu_fast.sweeping import SweepConfig

REPOSITORY = str(Path(vdu_fast.__file__).parents[1])
TINY_PRETRAIN = shlex.split("--steps 8 --anneal_steps 2 --warmup_steps 2 --checkpoints 4 --channels [8] --batch_size 8")
TINY_UNLEARN = shlex.split(
    "--steps 4 --batch_size 8 --replay_batch_size 8 --replay_samples 24 --replay_sampler_steps 4 --replay_states 2 "
    "--check_every 2 --check_size 8"
)
TINY_EVALUATE = shlex.split("--samples 24 --sampler_steps 3 --batch_size 24 --loss_images 8 --loss_timesteps 2")


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(capsys):
    """Run one command in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(cli):
    """Run a command that must be refused, and return the message after checking its form."""

    def run(*arguments: object) -> str:
        code, out, err = cli(*arguments)
        assert code == 2, err
        assert "Traceback" not in out + err
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1
        return messages[0]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pipeline folder with a posterior.safetensors that fits."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = build_pipeline()
    pipeline.save_pretrained(str(folder))
    random_posterior(pipeline.unet).save(folder / "posterior.safetensors")
    return folder


@pytest.fixture
def unlearn(model, tmp_path):
    """The arguments of a tiny `unlearn` into tmp_path/out; keyword arguments replace or add some."""

    def arguments(**changes: object) -> list[object]:
        flags = {
            "model": model,
            "posterior": model / "posterior.safetensors",
            "forget": "digits:3",
            "output": tmp_path / "out",
            **changes,
        }
        return ["unlearn", *TINY_UNLEARN, *(word for name, value in flags.items() for word in (f"--{name}", value))]

    return arguments


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its checksum."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pictures(folder: Path, count: int = 10, size: int = 8, mode: str = "L") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        shape = (size, size) if mode == "L" else (size, size, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


class TestSettings:
    def test_top_level_help_lists_commands_and_needs_no_torch(self):
        code = "import sys; from vdu_fast.cli import main; main(['--help']); print('torch' in sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
        assert all(f"\n  {name} " in run.stdout for name in COMMANDS)
        assert run.stdout.splitlines()[-1] == "False"

    @pytest.mark.parametrize(
        ("command", "settings"),
        [
            ("pretrain", PretrainConfig),
            ("unlearn", UnlearnConfig),
            ("profile", UnlearnConfig),
            ("sweep", SweepConfig),
            ("evaluate", EvaluationConfig),
            ("evaluate", PersistenceConfig),
            ("compare", PersistenceConfig),
        ],
    )
    def test_every_setting_is_a_flag_with_help(self, cli, command, settings):
        code, out, _ = cli(command, "--help")
        assert code == 0
        for field in dataclasses.fields(settings):
            flag = out.partition(f"\n  --{field.name}")[2]
            assert flag, field.name
            # The help text follows on the same line or on the next.
            assert len(flag.partition("\n  --")[0].split()) > 2, field.name

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_help(self, cli, command):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert out.startswith(f"usage: vdu-fast {command}")

    def test_version(self, cli):
        code, out, _ = cli("--version")
        assert code == 0
        assert out.startswith("vdu-fast ")

    def test_yaml_overrides_defaults_and_flags_override_yaml(self, cli, unlearn, tmp_path):
        settings = tmp_path / "settings.yaml"
        settings.write_text("gamma: 0.2\nrollback: true\noverwrite: true\ntrainable: ['mid_block*']\n")
        code, _, err = cli(*unlearn(gamma=0.3), "--config", settings, "--rollback", "false", "--quiet")
        assert code == 0, err
        # argparse applies in order: what follows --config wins over it, and gamma came before.
        written = json.loads((tmp_path / "out" / "unlearn.json").read_text())["settings"]
        assert written["gamma"] == 0.2
        assert written["rollback"] is False
        assert written["trainable"] == ["mid_block*"]
        assert written["learning_rate"] == UnlearnConfig().learning_rate

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["frobnicate"], "no command 'frobnicate'; choose a command: demo, pretrain"),
            (["--frobnicate"], "no option '--frobnicate'"),
            (["unlearn"], "missing: --model, --posterior, --forget, --output. See `vdu-fast unlearn --help`."),
            (["demo", "--samples", "many"], "--samples: expected int, got many"),
            (["demo", "--overwrite", "perhaps"], "--overwrite: expected bool"),
            (["demo", "--sample", "3"], "unrecognized arguments: --sample 3"),
            (["demo", "--threads", "0"], "--threads must be at least 1"),
            (["demo", "--config", "absent.yaml"], "--config: File does not exist"),
        ],
    )
    def test_wrong_usage(self, refused, arguments, expected):
        assert expected in refused(*arguments)

    @pytest.mark.parametrize(("text", "expected"), [("gama: 0.3", "gama"), ("gamma: [0.3", "config"), ("7", "config")])
    def test_wrong_yaml(self, refused, unlearn, tmp_path, text, expected):
        (tmp_path / "bad.yaml").write_text(text)
        assert expected in refused(*unlearn(config=tmp_path / "bad.yaml"))


class TestCommands:
    def test_four_commands_in_a_row(self, cli, tmp_path):
        trained, posterior, unlearned = tmp_path / "trained", tmp_path / "posterior.safetensors", tmp_path / "unlearned"
        code, out, err = cli("pretrain", "--data", "digits", "--output", trained, *TINY_PRETRAIN)
        assert code == 0, err
        assert f"vdu-fast unlearn --model {trained}" in out
        checkpoints = sorted((trained / "checkpoints").glob("*.safetensors"))
        code, _, err = cli("posterior", "--checkpoints", *checkpoints, "--output", posterior)
        assert code == 0, err
        before = contents(trained)
        bank = tmp_path / "bank.safetensors"
        arguments = ["--model", trained, "--posterior", posterior, "--forget", "digits:3", "--bank", bank]
        code, out, err = cli("unlearn", *arguments, "--output", unlearned, "--pass_on_bank", "true", *TINY_UNLEARN)
        assert code == 0, err
        left = unlearned / "passed-on" / "bank.safetensors"
        assert f"For the next request on it: --model {unlearned} --bank {left}" in out
        assert "KL/weight" in err
        assert bank.is_file()
        assert f"vdu-fast evaluate --before {trained} --after {unlearned} --data LABELLED_DATA --forget CLASS" in out
        assert contents(trained) == before
        arguments = ["--model", unlearned, "--posterior", posterior, "--forget", "digits:5", "--bank", left]
        code, _, err = cli("unlearn", *arguments, "--output", tmp_path / "both", *TINY_UNLEARN)
        assert code == 0, err
        assert load_pipeline(unlearned).unet.config.sample_size == 8

        classifier = tmp_path / "classifier.safetensors"
        forget = self.drawn_class(trained, classifier)
        report = tmp_path / "report"
        flags = ["--before", trained, "--after", unlearned, "--data", "digits", "--forget", forget, "--output", report]
        code, out, err = cli("evaluate", *flags, "--classifier", classifier, *TINY_EVALUATE)
        assert code == 0, err
        assert f"{report / 'report.html'}" in out
        metrics = json.loads((report / "metrics.json").read_text())
        assert metrics["settings"]["steps"] == 4
        assert metrics["settings"]["evaluation"]["samples"] == 24
        seconds = metrics["seconds"]
        assert seconds["unlearn"] == pytest.approx(seconds["bank"] + seconds["filter"] + seconds["steps"])
        assert seconds["total"] == pytest.approx(seconds["unlearn"] + seconds["evaluate"])
        assert (report / "losses.png").is_file()

    @staticmethod
    def drawn_class(model: Path, classifier_file: Path) -> str:
        """Save an untrained but decided classifier, and find the class it sees most in the model's samples."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            classifier = ImageClassifier(1, (8, 8), tuple("0123456789"))
        classifier.head.weight.data.mul_(1000)
        classifier.save(classifier_file)
        images = sample_images(denoiser_of(load_pipeline(model)), 24, steps=3, seed=EvaluationConfig().seed)
        return str(int(classifier.embed_and_classify(images)[1].mode().values))

    def test_evaluation_warns_of_the_classifier_that_filtered(self, cli, unlearn, model, tmp_path):
        classifier = tmp_path / "classifier.safetensors"
        forget = self.drawn_class(model, classifier)
        absent = next(name for name in "0123456789" if name != forget)
        flags = {"bank_filter": "classifier", "filter_classifier": classifier, "forget_label": absent}
        code, _, err = cli(*unlearn(**flags, max_dropped=0.9))
        assert code == 0, err
        where = ["--before", model, "--after", tmp_path / "out", "--data", "digits", "--forget", forget]
        code, out, err = cli(
            "evaluate", *where, "--output", tmp_path / "report", "--classifier", classifier, *TINY_EVALUATE
        )
        assert code == 0, err
        assert "judges its own work" in " ".join((out + err).split())
        assert "took no part" not in (tmp_path / "report" / "report.html").read_text()

    def test_a_judge_from_the_seed_of_the_filter_is_known_without_its_file(self):
        filter_classifier, judge = (ImageClassifier(1, (8, 8), ("a", "b")) for _ in range(2))
        record = {"weights": fingerprint(filter_classifier), "seed": 4321}
        unlearned = {"inputs": {"filter_classifier": record}}
        assert _judged_by_its_filter(filter_classifier, unlearned)
        judge.seed = 4321
        assert _judged_by_its_filter(judge, unlearned)
        judge.seed = 5
        assert not _judged_by_its_filter(judge, unlearned)
        assert not _judged_by_its_filter(judge, {})

    def test_evaluation_asks_whether_it_stays_forgotten(self, cli, model, tmp_path):
        forget = self.drawn_class(model, tmp_path / "classifier.safetensors")
        where = [
            "--before",
            model,
            "--after",
            model,
            "--data",
            "digits",
            "--forget",
            forget,
            "--output",
            tmp_path / "r",
        ]
        small = shlex.split("--relearn_steps [0,1] --relearn_samples 24 --inverted_images 4 --membership_timesteps 2")
        judge = ["--classifier", tmp_path / "classifier.safetensors"]
        code, out, err = cli(
            "evaluate", *where, *judge, "--output", tmp_path / "r", *TINY_EVALUATE, "--persistence", *small
        )
        assert code == 0, err
        assert "half is back" in out
        metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
        assert metrics["persistence"]["relearning"]["forget"]["half_life"] == 0.0

    def test_evaluation_writes_the_classifier_it_trained(self, cli, model, tmp_path):
        generator = np.random.default_rng(0)
        images, labels = generator.integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
        np.savez(tmp_path / "data.npz", images=images, labels=labels)
        classifier = tmp_path / "classifier.safetensors"
        where = ["--before", model, "--after", model, "--data", tmp_path / "data.npz", "--classifier", classifier]
        # The model is untrained: which of the two classes it draws is open, but it draws one.
        codes = [
            cli("evaluate", *where, "--forget", name, "--output", tmp_path / name, *TINY_EVALUATE)[0] for name in "01"
        ]
        assert 0 in codes
        assert ImageClassifier.load(classifier).class_names == ("0", "1")

    def test_evaluation_writes_the_samples_it_drew_and_reads_them(self, cli, model, tmp_path):
        where = ["--before", model, "--after", model, "--data", "digits", "--forget", "3"]
        flags = [*where, "--original_samples", tmp_path / "drawn.safetensors", *TINY_EVALUATE]
        metrics = []
        for name in "ab":
            assert cli("evaluate", *flags, "--output", tmp_path / name)[0] == 0
            metrics.append(json.loads((tmp_path / name / "metrics.json").read_text())["u_fid"])
            written = (tmp_path / "drawn.safetensors").stat().st_mtime_ns
        assert metrics[0] == metrics[1]
        code, _, err = cli("evaluate", *flags, "--output", tmp_path / "c", "--seed", 99)
        assert (code, "was drawn with seed" in err) == (2, True)
        assert (tmp_path / "drawn.safetensors").stat().st_mtime_ns == written

    def test_posterior_of_a_single_model(self, cli, model, tmp_path):
        output = tmp_path / "posterior.safetensors"
        code, out, err = cli(
            "posterior", "--fisher", "--model", model, "--output", output, "--draws", 4, "--sampler_steps", 2
        )
        assert code == 0, err
        assert str(output) in out
        posterior = GaussianPosterior.load(output)
        assert posterior.source["draws"] == "4"
        posterior.check_fits(dict(load_pipeline(model).unet.named_parameters()))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_posterior_of_a_single_model_on_a_gpu_is_that_of_the_cpu(self, cli, model, tmp_path):
        std = []
        for device in ("cpu", "cuda"):
            flags = ["--output", tmp_path / f"{device}.safetensors", "--draws", 4, "--sampler_steps", 2]
            code, _, err = cli("posterior", "--fisher", "--model", model, "--device", device, *flags)
            assert code == 0, err
            std.append(GaussianPosterior.load(tmp_path / f"{device}.safetensors").std)
        for name in std[0]:
            torch.testing.assert_close(std[0][name], std[1][name], rtol=0.05, atol=1e-6)

    def test_posterior_takes_a_folder_of_checkpoints(self, cli, tmp_path):
        states = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 5.0])}]
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        for index, state in enumerate(states):
            save_file(state, folder / f"step-{index}.safetensors")
        output = tmp_path / "posterior.safetensors"
        code, _, err = cli("posterior", "--checkpoints", folder, "--output", output, "--shrink", 0)
        assert code == 0, err
        assert torch.allclose(load_file(output)["std.w"], torch.tensor([2.0, 8.0]).sqrt())

    def test_a_pipeline_folder_as_checkpoint_is_its_unet_and_not_the_posterior_beside_it(self, cli, model, tmp_path):
        other = build_pipeline()
        with torch.no_grad():
            for parameter in other.unet.parameters():
                parameter.add_(0.01)
        other.save_pretrained(str(tmp_path / "other"))
        output = tmp_path / "posterior.safetensors"
        code, _, err = cli("posterior", "--checkpoints", model, tmp_path / "other", "--output", output)
        assert code == 0, err
        assert set(GaussianPosterior.load(output).std) == {name for name, _ in other.unet.named_parameters()}

    def test_flat_folder_is_forgotten_whole(self, cli, unlearn, tmp_path):
        code, _, err = cli(*unlearn(forget=pictures(tmp_path / "unwanted", count=10)))
        assert code == 0, err
        assert "10 images" in err
        assert json.loads((tmp_path / "out" / "unlearn.json").read_text())["forget_images"] == 10

    def test_several_classes_are_forgotten_with_a_warning_that_names_them(self, cli, unlearn, tmp_path):
        for name in ("boots", "shoes"):
            pictures(tmp_path / "data" / name)
        code, _, err = cli(*unlearn(forget=tmp_path / "data"), "--quiet")
        assert code == 0, err
        assert "holds the classes boots, shoes, and all of them will be forgotten" in err
        assert f"--forget {tmp_path / 'data'}:boots" in err

    @pytest.mark.parametrize("forget", ["data:boots", "data/boots"])
    def test_one_class_is_forgotten_without_a_warning(self, cli, unlearn, tmp_path, forget):
        for name in ("boots", "shoes"):
            pictures(tmp_path / "data" / name, count=12)
        code, _, err = cli(*unlearn(forget=tmp_path / forget), "--quiet")
        assert code == 0, err
        assert err == ""

    def test_resize_and_image_channels(self, cli, unlearn, tmp_path):
        unwanted = pictures(tmp_path / "unwanted", size=12, mode="RGB")
        code, _, err = cli(*unlearn(forget=unwanted, resize=8, image_channels=1))
        assert code == 0, err

    def test_quiet_and_log_length(self, cli, unlearn):
        code, _, err = cli(*unlearn(steps=40))
        assert code == 0
        assert 5 < len(err.splitlines()) <= 20
        code, _, err = cli(*unlearn(), "--overwrite", "--quiet")
        assert code == 0
        assert err == ""


class TestBadInput:
    """Exit code 2, one message that says what to do, nothing touched."""

    @pytest.fixture(autouse=True)
    def _nothing_is_overwritten(self, tmp_path, model):
        keep = tmp_path / "out" / "mine.txt"
        keep.parent.mkdir()
        keep.write_text("mine")
        before = contents(model)
        yield
        assert keep.read_text() == "mine"
        assert list(keep.parent.glob("*.safetensors")) + list(keep.parent.glob("*.json")) == []
        assert contents(model) == before

    @pytest.fixture
    def new(self, unlearn, tmp_path):
        """As `unlearn`, into a folder that does not exist."""
        return lambda **changes: unlearn(**({"output": tmp_path / "new"} | changes))

    def test_missing_and_empty_folder(self, refused, new, tmp_path):
        message = refused(*new(forget=tmp_path / "absent"))
        assert message.startswith("error: --forget: ")
        assert "accepted: 'digits'; a folder" in message
        (tmp_path / "empty").mkdir()
        assert "no images in" in refused(*new(forget=tmp_path / "empty"))
        message = refused("pretrain", "--data", tmp_path / "empty", "--output", tmp_path / "new", *TINY_PRETRAIN)
        assert message.startswith("error: --data: ")

    @pytest.mark.parametrize("data", [b"", b"not a picture"])
    def test_unreadable_image(self, refused, new, tmp_path, data):
        folder = pictures(tmp_path / "pictures")
        (folder / "bad.png").write_bytes(data)
        assert "bad.png" in refused(*new(forget=folder))

    def test_truncated_image(self, refused, new, tmp_path):
        folder = pictures(tmp_path / "pictures", count=3, size=64)
        whole = (folder / "1.png").read_bytes()
        (folder / "1.png").write_bytes(whole[: len(whole) // 2])
        assert "1.png" in refused(*new(forget=folder))

    def test_other_size_and_channels(self, refused, new, tmp_path):
        message = refused(*new(forget=pictures(tmp_path / "large", size=12)))
        assert "12x12" in message
        assert "--resize 8" in message
        message = refused(*new(forget=pictures(tmp_path / "colour", mode="RGB")))
        assert "3 channel" in message
        assert "--image_channels 1" in message
        mixed = pictures(tmp_path / "mixed")
        Image.new("L", (9, 9)).save(mixed / "odd.png")
        assert "--resize" in refused(*new(forget=mixed))

    def test_labels_absent(self, refused, new, model, tmp_path):
        flat = pictures(tmp_path / "flat")
        assert "no labels" in refused(*new(forget=f"{flat}:3"))
        flags = ["--before", model, "--after", model, "--data", flat, "--forget", "3", "--output", tmp_path / "new"]
        assert "labels" in refused("evaluate", *flags, *TINY_EVALUATE)

    def test_unknown_class(self, refused, new):
        assert "has no class 'eleven'; choose one of: 0, 1" in refused(*new(forget="digits:eleven"))

    def test_posterior_of_another_model(self, refused, new, model, tmp_path):
        posterior = GaussianPosterior.load(model / "posterior.safetensors")
        name, std = next(iter(posterior.std.items()))
        posterior.mean = None
        posterior.std[name] = std[:1].clone()
        posterior.save(tmp_path / "shape.safetensors")
        message = refused(*new(posterior=tmp_path / "shape.safetensors"))
        assert name in message
        assert "belongs to another model" in message
        posterior.std = {"other.weight": torch.ones(3)}
        posterior.save(tmp_path / "keys.safetensors")
        assert "another model" in refused(*new(posterior=tmp_path / "keys.safetensors"))
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        assert "is not a posterior file" in refused(*new(posterior=weights))

    def test_single_checkpoint(self, refused, model, tmp_path):
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        for path in (weights, model / "unet", model):
            flags = ["--checkpoints", path, "--output", tmp_path / "new.safetensors"]
            # The model folder also holds a posterior: as a checkpoint folder it is one file too.
            assert "--fisher --model DIR" in refused("posterior", *flags)

    def test_wrong_checkpoints(self, refused, model, tmp_path):
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        output = ["--output", tmp_path / "new.safetensors"]
        state = load_file(weights)
        name = next(iter(state))
        save_file(state | {name: torch.full_like(state[name], torch.nan)}, tmp_path / "nan.safetensors")
        message = refused("posterior", "--checkpoints", weights, tmp_path / "nan.safetensors", *output)
        assert "nan.safetensors" in message
        assert "NaN" in message
        (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
        assert "truncated" in refused("posterior", "--checkpoints", weights, tmp_path / "cut.safetensors", *output)
        torch.save(state, tmp_path / "pickle.pt")
        assert "pickle" in refused("posterior", "--checkpoints", weights, tmp_path / "pickle.pt", *output)
        assert "does not exist" in refused("posterior", "--checkpoints", weights, tmp_path / "absent", *output)
        (tmp_path / "pickles").mkdir()
        torch.save(state, tmp_path / "pickles" / "pytorch_model.bin")
        message = refused("posterior", "--checkpoints", tmp_path / "pickles", tmp_path / "pickles", *output)
        assert "pickle" in message

    def test_contradictory_posterior_source(self, refused, model, tmp_path):
        output = ["--output", tmp_path / "new.safetensors"]
        assert "got neither" in refused("posterior", *output)
        both = ["--fisher", "--model", model, "--checkpoints", model, model]
        assert "got both" in refused("posterior", *both, *output)
        assert "--fisher needs --model" in refused("posterior", "--fisher", *output)
        assert ".safetensors" in refused("posterior", "--fisher", "--model", model, "--output", tmp_path / "new.pt")

    @pytest.mark.parametrize("gamma", ["1", "-0.1"])
    def test_gamma(self, refused, new, gamma):
        message = refused(*new(gamma=gamma))
        assert "gamma must be in [0, 1)" in message
        assert gamma in message

    @pytest.mark.parametrize("flag", ["before", "after"])
    def test_report_over_a_model(self, refused, model, tmp_path, flag):
        other = tmp_path / "other"
        folders = {"before": other, "after": other, flag: model}
        where = [word for name, folder in folders.items() for word in (f"--{name}", folder)]
        data = ["--data", "digits", "--forget", "3", *TINY_EVALUATE]
        message = refused("evaluate", *where, *data, "--output", model / ".." / model.name, "--overwrite")
        assert f"is --{flag} itself" in message

    def test_occupied_output(self, refused, unlearn, model, tmp_path):
        out = tmp_path / "out"
        evaluate = ["evaluate", "--before", model, "--after", model, "--data", "digits", "--forget", "3"]
        for command in (
            unlearn(),
            ["pretrain", "--data", "digits", *TINY_PRETRAIN, "--output", out],
            [*evaluate, *TINY_EVALUATE, "--output", out],
            ["demo", "--output", out],
        ):
            if command[0] == "demo" and not (Path(vdu_fast.__file__).parent / "pretrained" / "digits").is_dir():
                continue
            message = refused(*command)
            assert "is not empty" in message
            assert "--overwrite" in message
        existing = tmp_path / "there.safetensors"
        existing.write_bytes(b"mine")
        assert "--overwrite" in refused("posterior", "--fisher", "--model", model, "--output", existing)
        assert existing.read_bytes() == b"mine"

    def test_device_that_is_not_here(self, refused, new, tmp_path):
        says = "device 'no-such-device' cannot be used here"
        assert says in refused(*new(device="no-such-device"))
        data = ["--data", "digits", "--output", tmp_path / "trained"]
        assert says in refused("pretrain", *TINY_PRETRAIN, *data, "--device", "no-such-device")
        model = ["--model", new()[new().index("--model") + 1], "--output", tmp_path / "p.safetensors"]
        assert says in refused("posterior", "--fisher", *model, "--device", "no-such-device")
        assert not (tmp_path / "trained").exists()
        assert not (tmp_path / "new").exists()

    def test_folder_where_a_file_is_meant_and_file_where_a_folder(self, refused, new, model, tmp_path):
        assert "is a folder" in refused(*new(bank=tmp_path))
        flags = ["--before", model, "--after", model, "--data", "digits", "--forget", "3"]
        message = refused("evaluate", *flags, "--output", tmp_path / "new", "--classifier", tmp_path, *TINY_EVALUATE)
        assert "is a folder" in message
        (tmp_path / "file").touch()
        assert "Not a directory" in refused(*new(output=tmp_path / "file" / "out"))

    def test_resume_without_a_run(self, refused, new):
        assert "nothing to resume" in refused(*new(), "--resume")

    def test_model_folder(self, refused, new, model, tmp_path):
        message = refused(*new(model=tmp_path / "absent"))
        assert message.startswith("error: --model ")
        assert "save_pretrained" in message
        (tmp_path / "empty").mkdir()
        assert "model_index.json" in refused(*new(model=tmp_path / "empty"))
        flags = ["--before", model, "--after", tmp_path / "empty", "--data", "digits", "--forget", "3"]
        message = refused("evaluate", *flags, "--output", tmp_path / "new", *TINY_EVALUATE)
        assert message.startswith("error: --after ")

    def test_pickled_model(self, refused, new, tmp_path):
        build_pipeline().save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
        assert "pickle" in refused(*new(model=tmp_path / "pickled"))

    def test_conditional_pipeline(self, refused, new, model, tmp_path):
        index = json.loads((model / "model_index.json").read_text())
        index |= {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
        (tmp_path / "conditional").mkdir()
        (tmp_path / "conditional" / "model_index.json").write_text(json.dumps(index))
        message = refused(*new(model=tmp_path / "conditional"))
        assert "conditional" in message
        assert "Supported: " in message

    def test_filter_classifier(self, refused, new, tmp_path):
        assert "--filter_classifier FILE and --forget_label" in refused(*new(bank_filter="classifier"))
        assert "--bank_filter classifier" in refused(*new(filter_classifier=tmp_path / "absent"))
        ImageClassifier(1, (8, 8), ("cat", "dog")).save(tmp_path / "animals.safetensors")
        flags = {"bank_filter": "classifier", "filter_classifier": tmp_path / "animals.safetensors"}
        assert "choose one of cat, dog" in refused(*new(**flags, forget_label="cow"))

    def test_loss_that_is_not_finite(self, refused, new, tmp_path):
        message = refused(*new(saturation="none", optimizer="natural", learning_rate="1e30"))
        assert "learning_rate" in message
        state = load_file(tmp_path / "new" / "resume" / "unlearn.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())

    def test_interrupted_by_the_disk(self, refused, new, monkeypatch):
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device", "out/unlearn.json")

        monkeypatch.setattr("vdu_fast.cli.unlearn.unlearn", full)
        assert "No space left on device" in refused(*new())


class TestDoctor:
    def test_tells_versions_devices_and_backends(self, cli):
        from vdu_fast import doctor

        code, out, _ = cli("doctor")
        assert code == (0 if all(check.passed for check in doctor.checks()) else 1)
        assert torch.__version__ in out
        assert all(name in out for name in ("sample_weights", "noise_prediction_loss", "gaussian_kl"))

    def test_random_numbers_are_as_published(self):
        from vdu_fast import doctor

        passed = {check.name: check.passed for check in doctor.checks()}
        assert passed["random words"]
        assert passed["random normals"]

    def test_a_failed_check_is_told_by_the_exit_code(self, cli, monkeypatch):
        monkeypatch.setattr("vdu_fast.doctor.NORMALS_DIGEST", "0" * 64)
        code, out, _ = cli("doctor")
        assert code == 1
        assert "FAILED" in out


def test_unlearn_never_replaces_the_model_it_reads(refused, model):
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    files = ["--model", model, "--posterior", model / "posterior.safetensors", "--output", model, "--overwrite"]
    assert "--model itself" in refused("unlearn", *files, "--forget", "digits:3")
    assert before == {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
