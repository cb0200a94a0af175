"""The report: files and keys, a page that needs nothing else, a verdict that follows the numbers."""

from __future__ import annotations

import copy
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vdu_fast import report
from vdu_fast.classifier import ImageClassifier
from vdu_fast.evaluation import Evaluation
from vdu_fast.figures import png
from vdu_fast.report import judge, plain, print_summary, write_report

NAMES = ("T-shirt/top", "<b>bag</b>", "$x$ & co")
HISTORY = [{"step": i, "loss": 1 - i / 20, "forget_ratio": 1 + i / 9, "penalty": i / 50} for i in range(9)]


def example(channels: int = 1, size: int = 8, samples: int = 30) -> Evaluation:
    labels_before = torch.arange(samples) % 3
    labels_after = torch.where(labels_before == 1, 0, labels_before)
    labels_after[1] = 1
    images = torch.rand(2, samples, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metrics = {
        "forgotten_class": {"index": 1, "name": NAMES[1]},
        "pul": 90.0,
        "u_fid": {"before": 70.0, "after": 15.5, "oracle": 12.9, "floor": 6.8},
        "feature_extractor": "penultimate layer",
        "shares": {
            "before": dict(zip(NAMES, (1 / 3, 1 / 3, 1 / 3), strict=True)),
            "after": dict(zip(NAMES, (19 / 30, 1 / 30, 1 / 3), strict=True)),
            "kept_ratio": {NAMES[0]: 1.9, NAMES[2]: 1.0},
            "kept_ratio_min": 1.0,
            "kept_ratio_min_class": NAMES[2],
        },
        "forget_loss": {"before": 0.07, "after": 0.09, "images": 12, "timesteps": 10, "ratio": 0.09 / 0.07},
        "counts": {
            "samples": samples,
            "forgotten_before": 10,
            "forgotten_after": 1,
            "real": 1000,
            "floor": 300,
            "oracle": samples,
            "oracle_extra_drawn": 11,
        },
        "sampler": {"name": "DDIM (eta = 0)", "steps": 50, "seed": 1234},
        "classifier": {"seed": 4321, "accuracy": 0.991, "accuracy_images": 360},
        "omitted": {"retained_loss": "no held-out image of that kind"},
        "warnings": ["the floor has 300 images"],
    }
    classifier = ImageClassifier(channels, (size, size), NAMES)
    return Evaluation(metrics, images[0], images[1], labels_before, labels_after, NAMES, 1, classifier, images[0])


@dataclass
class Settings:
    gamma: float = 0.1
    clip: float = float("inf")
    guards: dict = field(default_factory=lambda: {"hinge": 0.3})
    posterior: Path = Path("posterior.safetensors")


def write(folder: Path, **changes):
    arguments = {
        "evaluation": example(),
        "settings": Settings(),
        "seed": 7,
        "seconds": {"unlearn": 35.2, "total": 80.0},
        "history": HISTORY,
        "title": "Forget <bag>",
    }
    return write_report(folder, **{**arguments, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "folder"
    write(path)
    return path


def test_metrics_file(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["pul"] == 90
    assert set(metrics["u_fid"]) == {"before", "after", "oracle", "floor"}
    assert metrics["shares"]["before"].keys() == metrics["shares"]["after"].keys() == set(NAMES)
    assert metrics["seconds"] == {"unlearn": 35.2, "total": 80.0}
    assert metrics["settings"] == {
        "gamma": 0.1,
        "clip": "inf",
        "guards": {"hinge": 0.3},
        "posterior": "posterior.safetensors",
    }
    assert metrics["seed"] == 7
    assert {"python", "torch", "torchmetrics"} <= set(metrics["versions"])


def test_every_file_is_written_and_nothing_else(folder: Path) -> None:
    names = {"metrics.json", "report.html", "samples.png", "shares.png", "losses.png", "tradeoff.png"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.glob("*.png"):
        assert min(Image.open(path).size) > 300


def test_page_is_self_contained_and_escaped(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    sources = re.findall(r'\bsrc="([^"]*)"', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert "<b>bag</b>" not in page
    assert "&lt;b&gt;bag&lt;/b&gt;" in page
    assert "<title>Forget &lt;bag&gt;</title>" in page
    for text in ("15.5", "12.9", "90.0%", "guards.hinge", "the floor has 300 images", "no held-out image of that kind"):
        assert text in page


def test_without_history_the_losses_are_left_out_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path)
    assert (tmp_path / "losses.png").exists()
    evaluation = example()
    metrics = write(tmp_path, evaluation=evaluation, history=None, versions={"torch": "1"})
    assert not (tmp_path / "losses.png").exists()
    assert metrics["omitted"]["losses.png"] == "no training history was given"
    assert "no training history was given" in (tmp_path / "report.html").read_text()
    assert metrics["versions"] == {"torch": "1"}
    assert "losses.png" not in evaluation.metrics["omitted"]


def test_numbers_that_are_absent_do_not_appear(tmp_path: Path) -> None:
    evaluation = example()
    for key in ("oracle", "floor"):
        del evaluation.metrics["u_fid"][key]
    for key in ("kept_ratio_min", "kept_ratio_min_class"):
        del evaluation.metrics["shares"][key]
    del evaluation.metrics["forget_loss"], evaluation.metrics["classifier"]["accuracy"]
    metrics = write(tmp_path, evaluation=evaluation, seconds={}, history=[{"step": 0, "loss": float("nan")}])
    page = (tmp_path / "report.html").read_text()
    assert "u-FID, oracle" not in page
    assert "Time to unlearn" not in page
    console = Console(file=io.StringIO(), width=100)
    print_summary(metrics, console)


def test_the_page_shows_the_other_distances_and_whether_it_stays_forgotten(tmp_path: Path) -> None:
    evaluation = example()
    sides = {"before": 0.5, "after": 0.875, "oracle": 0.75}
    evaluation.metrics.update({name: dict(sides) for name in ("kid", "recall")}, precision={"before": 0.5})
    lives = {"images": 8, "counts": [1, 9], "half_life": 33.0}
    evaluation.metrics["persistence"] = {
        "relearning": {"samples": 200, "before": 20, "steps": [0, 80], "forget": lives, "unrelated": lives},
        "inversion": {"before": 0.98, "after": 0.25},
    }
    write(tmp_path, evaluation=evaluation)
    page = (tmp_path / "report.html").read_text()
    row = re.search(r"<tr><td>Recall</td>.*</tr>", page)
    assert row is not None
    assert "0.50" in row[0]
    assert "0.88" in row[0]
    assert "Oracle: 0.75" in row[0]
    assert "KID" in page
    assert "<td>Precision</td>" not in page  # nothing was measured after
    assert "after 33 steps" in page
    assert "1 -&gt; 9 of 20 in 200 samples" in page


def test_forgotten_samples_are_framed() -> None:
    evaluation = example()
    grid = report._pair_grid(evaluation, torch.tensor([0, 1]))
    red = np.array([round(255 * part) for part in matplotlib.colors.to_rgb(report.FORGOTTEN)])
    step = grid.shape[1] // 8
    side = (step - 16) // 2
    corners = [grid[0, pair * step + place * side] for pair in (0, 1) for place in (0, 1)]
    assert [bool((corner == red).all()) for corner in corners] == [False, False, True, True]
    inside = (evaluation.after[1, 0, 0, 0] + 1) * 127.5
    assert grid[report._FRAME, step + side + report._FRAME, 0] == int(inside.round())


@pytest.mark.parametrize(("channels", "size"), [(3, 28), (1, 100), (2, 8)])
def test_sample_grid_of_other_images(channels: int, size: int) -> None:
    figure = report.draw_samples(example(channels, size, samples=12))
    assert Image.open(io.BytesIO(png(figure))).size[0] > 800


def test_losses_use_what_was_recorded() -> None:
    titles = [axes.get_title(loc="left") for axes in report.draw_losses(HISTORY).axes]
    assert titles == ["objective", "forget loss / its start", "KL per weight from the original"]
    figure = report.draw_losses([{"forget_loss": 0.1, "loss": None}, {"forget_loss": 0.2}])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["forget loss"]
    assert report.draw_losses([]) is None


@pytest.mark.parametrize(
    ("pul", "u_fid", "kept", "level", "headline"),
    [
        (99.0, 15.0, 0.8, "good", "has forgotten “x” and still draws the rest"),
        (99.0, 30.0, 0.8, "mixed", "but the rest has suffered"),
        (99.0, 15.0, 0.4, "mixed", "but the rest has suffered"),
        (80.0, 15.0, 0.8, "mixed", "has not forgotten it"),
        (20.0, 15.0, 0.8, "bad", "still draws “x”"),
        (-20.0, 15.0, 0.8, "bad", "still draws “x”"),
    ],
)
def test_verdict(pul: float, u_fid: float, kept: float, level: str, headline: str) -> None:
    metrics = copy.deepcopy(example().metrics)
    metrics["pul"], metrics["u_fid"]["after"], metrics["shares"]["kept_ratio_min"] = pul, u_fid, kept
    metrics["forgotten_class"]["name"] = "x"
    verdict = judge(metrics)
    assert verdict["level"] == level
    assert headline in verdict["headline"]
    assert [met for met, _, _ in verdict["checks"]] == [pul >= 95, u_fid <= 1.5 * 12.9, kept >= 0.6]


def test_summary_shows_every_number_beside_its_reference() -> None:
    metrics = {**example().metrics, "seconds": {"unlearn": 35.2}}
    console = Console(file=io.StringIO(), width=110)
    print_summary(metrics, console)
    text = console.file.getvalue()
    numbers = (
        "90.0%",
        "10 -> 1",
        "15.5",
        "original 70.0",
        "oracle 12.9",
        "held-out 6.8",
        "1.20 x oracle",
        "unlearn 35.2",
    )
    for part in (*numbers, "<b>bag</b>", "50 steps of DDIM", "Note: the floor has 300 images"):
        assert part in text


def test_plain() -> None:
    value = {"a": (1, torch.tensor([1.5])), 3: {np.float32(2)}, "n": None, "nan": float("nan"), "b": True}
    assert plain(value) == {"a": [1, [1.5]], "3": [2.0], "n": None, "nan": "nan", "b": True}
