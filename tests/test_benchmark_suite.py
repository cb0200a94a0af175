"""The benchmarks as a suite: every question can be asked, a missed budget is told, nothing measured is lost."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vdu_fast.benchmarks import suite, versus
from vdu_fast.benchmarks.case import (
    FILES,
    Budget,
    Case,
    Question,
    Setting,
    WrongResult,
    check_close,
    load_questions,
)
from vdu_fast.benchmarks.measure import COPY, measure
from vdu_fast.benchmarks.operations import operations_for
from vdu_fast.benchmarks.parameters import State, stable_diffusion_shapes
from vdu_fast.benchmarks.roofline import write_roofline
from vdu_fast.benchmarks.tables import environment, lines_of, missed_budgets, write_csv, write_markdown
from vdu_fast.cli import main
from vdu_fast.errors import InputError

TINY = Setting(torch.device("cpu"), [torch.Size([64, 100]), torch.Size([257])], quick=True)
CPU = torch.device("cpu")


class TestQuestions:
    def test_every_file_of_cases_is_in_the_registry(self):
        files = (Path(suite.__file__).parent / "cases").glob("*.py")
        assert {path.stem for path in files} - {"__init__"} == set(FILES)
        assert all(q.group in ("ops", "step", "loop", "machine") for q in load_questions().values())

    @pytest.mark.parametrize("name", [n for n, q in load_questions().items() if q.group == "ops"])
    def test_an_op_is_right_before_it_is_timed_and_all_calls_run(self, name, monkeypatch):
        # Uncompiled: Inductor's minute says nothing about the questions.
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        case = load_questions()[name].make(TINY)
        for call in (*case.baselines.values(), *case.ours.values()):
            call()
        assert case.units > 0

    @pytest.mark.parametrize("name", ["sample_weights", "gradients", "noised_images"])
    def test_a_wrong_result_is_not_timed(self, name, monkeypatch):
        module = __import__(f"vdu_fast.benchmarks.cases.{name}", fromlist=["x"])
        wrong = {
            "sample_weights": "sample_weights_",
            "gradients": "variational_gradients",
            "noised_images": "mix_noise",
        }
        right = getattr(module.ops, wrong[name])

        def broken(*args, **options):
            result = right(*args, **options)
            for tensor in args[0] if name == "sample_weights" else result if isinstance(result, tuple) else (result,):
                tensor.add_(0.5)
            return result

        monkeypatch.setattr(module.ops, wrong[name], broken)
        question = {"gradients": "sample + KL + gradients", "noised_images": "add_noise"}.get(name, name)
        with pytest.raises(WrongResult, match="is wrong by"):
            load_questions()[question].make(TINY)

    def test_a_question_whose_package_is_missing_is_left_out_with_its_reason(self):
        question = replace(load_questions()["sample_weights"], needs=("no_such_package",))
        (answer,) = suite.ask([question], TINY)
        assert answer.lines == []
        assert answer.left_out == "it needs no_such_package, which is not installed"
        assert "about cuda" in replace(question, devices=("cuda",)).absence(TINY)

    def test_a_pattern_in_no_name_is_refused(self):
        with pytest.raises(InputError, match="no question contains 'sampel'"):
            suite.chosen(["sampel"])
        assert [q.name for q in suite.chosen(["SAMPLE_w"])] == ["sample_weights"]
        assert all(q.quick for q in suite.chosen([], quick=True))

    def test_the_shape_of_stable_diffusion(self):
        shapes = stable_diffusion_shapes()
        assert sum(shape.numel() for shape in shapes) == 859_520_964
        assert len(shapes) == 686

    def test_state_is_made_when_asked_for_and_lists_share_it(self):
        s = State(TINY.shapes, dtype=torch.bfloat16)
        assert "mean" not in vars(s)
        assert (s.theta.dtype, s.center.dtype) == (torch.bfloat16, torch.float32)
        s.lists("mean")[1].zero_()
        assert not s.mean[6400:].any()
        assert s.mean[:6400].any()
        with pytest.raises(AttributeError):
            s.nothing  # noqa: B018

    def test_operations_grow_with_the_parameters_and_copies_are_free(self):
        def call(s):
            s.theta.copy_(s.mean * 2 + s.z)

        assert operations_for(1000, call) == 2000


class TestMeasuring:
    def test_a_baseline_that_fails_is_told_and_ours_raises(self):
        def broken():
            raise RuntimeError("no compiler")

        times, failed = measure(Case({"bad": broken, "good": int}, {"vdu_fast": int}, 1, repeats=3), CPU, copied=10)
        assert failed == {"bad": "RuntimeError: no compiler"}
        assert set(times) == {"good", "vdu_fast", COPY}
        assert all(len(seconds) == 3 for seconds in times.values())
        with pytest.raises(RuntimeError, match="no compiler"):
            measure(Case({}, {"vdu_fast": broken}, 1), CPU, copied=10)

    def test_a_wrong_number_is_told(self):
        with pytest.raises(WrongResult, match=r"x is wrong by 5\.0e-01"):
            check_close("x", torch.tensor([1.0]), torch.tensor([2.0]))


def lines(ours=1.0, *, bytes=0, copy=1.0, **budget):
    """Lines of a case whose baselines take 3 and 4 seconds, beside a copy of one number in `copy` seconds."""
    case = Case({"_foreach": int, "compile": int}, {"vdu_fast": int}, 10, bytes=bytes, budget=Budget(**budget))
    times = {"_foreach": [4.0] * 3, "compile": [3.0] * 3, "vdu_fast": [ours] * 3, COPY: [copy] * 3}
    return [{"question": "q", **line} for line in lines_of(case, times, {"eager": "no"}, copied=1)]

    def test_without_git_there_is_no_commit(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert environment(CPU, 1)["commit"] == "none"


class TestBudgets:
    def test_ratio_share_and_units(self):
        theirs, _, ours, failed = lines(ours=1.5, bytes=8, copy=1.0)
        assert theirs["ns_per_unit"] == pytest.approx(4e8)
        assert "ratio_to_best_baseline" not in theirs
        assert (ours["ratio_to_best_baseline"], ours["best_baseline"]) == (2.0, "compile")
        assert ours["share_of_copy_bandwidth"] == pytest.approx(1 / 1.5)
        assert failed["note"] == "cannot run here: no"

    @pytest.mark.parametrize(
        ("ours", "budget", "kept"),
        [
            (1.0, {"ratios": {"": 3}}, True),
            (1.1, {"ratios": {"": 3}}, False),
            (1.3, {"ratios": {"_foreach": 3}}, True),  # of the fastest whose name begins so, not of any
            (1.4, {"ratios": {"_foreach": 3}}, False),
            (1.1, {"ratios": {"": 3}, "bandwidth": 0.9}, True),  # 91% of copy: the memory's limit
            (1.2, {"bandwidth": 0.9}, False),
            (0.3, {"part": 0.1}, True),
            (1.2, {"part": 0.1}, False),
        ],
    )
    def test_kept_and_missed(self, ours, budget, kept):
        # 8 bytes beside a copy of 8 bytes in a second: shares matter only where the budget or the time says so.
        needs_bytes = "bandwidth" in budget
        found = lines(ours, bytes=8 if needs_bytes else 0, **budget)
        assert found[2]["kept"] is kept
        assert bool(missed_budgets(found)) is not kept

    def test_a_budget_for_an_absent_baseline_is_not_asked(self):
        assert "kept" not in lines(ours=9.0, ratios={"cuda": 3})[2]

    def test_what_is_missed_is_told_with_figures(self):
        (missed,) = missed_budgets(lines(ours=2.0, bytes=8, ratios={"": 3}, bandwidth=0.7))
        assert missed == "q, vdu_fast: budget 3 x the best, 70% of copy; missed: 1.50 x the best, 50% of copy"


class TestFiles:
    def test_csv_markdown_and_picture(self, tmp_path):
        found = lines(ours=2.0, bytes=8, ratios={"": 3})
        write_csv(tmp_path / "a.csv", found, {"device": "here", "threads": 2})
        rows = list(csv.DictReader((tmp_path / "a.csv").open()))
        assert [row["implementation"] for row in rows] == ["_foreach", "compile", "vdu_fast", "eager"]
        assert (rows[2]["ratio_to_best_baseline"], rows[2]["kept"], rows[2]["device"]) == ("1.5", "False", "here")
        write_markdown(tmp_path / "a.md", found, {"device": "here"})
        text = (tmp_path / "a.md").read_text()
        assert "- q, vdu_fast: budget 3 x the best; missed: 1.50 x the best" in text
        assert not write_roofline(tmp_path / "no.png", found, 1e9, "nothing to draw")
        found[2] |= {"operations_per_byte": 3.0, "gigaoperations_per_second": 1e-9}
        assert write_roofline(tmp_path / "a.png", found, 1e9, "a machine")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_the_command_keeps_what_was_answered_before_a_failure(self, tmp_path, monkeypatch, capsys):
        def fails(setting):
            raise RuntimeError("the machine burns")

        answered = Question(
            "first", lambda setting: [{"implementation": "x", "milliseconds": 1.0, "spread": 0.0}], "ops"
        )
        broken = Question("second", fails, "ops")
        monkeypatch.setattr("vdu_fast.cli.benchmark.chosen", lambda *_, **__: [answered, broken])
        monkeypatch.setattr("vdu_fast.cli.benchmark.make_setting", lambda device, quick: TINY)
        out = tmp_path / "out"
        assert main(["benchmark", "--output", str(out), "--device", "cpu"]) == 1
        assert "left out: second: RuntimeError: the machine burns" in capsys.readouterr().out
        assert json.loads((out / "benchmark.json").read_text())["lines"][0]["question"] == "first"
        monkeypatch.setattr("vdu_fast.cli.benchmark.chosen", lambda *_, **__: [answered])
        assert main(["benchmark", "--output", str(out), "--device", "cpu"]) == 2
        assert "overwrite" in capsys.readouterr().err
        assert main(["benchmark", "--output", str(out), "--device", "cpu", "--overwrite"]) == 0
        assert "first" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [(["--ops", "[sampel]"], "no question contains 'sampel'"), (["--device", "tpu"], "--device 'tpu'")],
    )
    def test_mistakes(self, flags, expected, tmp_path, capsys):
        assert main(["benchmark", "--output", str(tmp_path / "out"), *flags]) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestVersus:
    def test_what_is_slower_beyond_the_noise_is_told(self, capsys):
        base = {"vdu_fast": [1.0, 1.0, 1.0], "_foreach": [1.0] * 3, "gone": [1.0] * 3}
        here = {"vdu_fast": [1.2, 1.2, 1.2], "_foreach": [9.0] * 3, "new": [1.0] * 3}
        assert versus._told("q", base, here) == ["q, vdu_fast: 1.20 x the time"]
        noisy = {"vdu_fast": [0.9, 1.2, 1.5]}
        assert versus._told("q", base, noisy) == []
        assert "0.83 x" in capsys.readouterr().out

    def test_red_tests_are_refused(self, monkeypatch):
        monkeypatch.setattr(versus, "TESTS", ("tests/no_such_test.py",))
        with pytest.raises(InputError, match="the tests of the ops fail"):
            versus.compare("HEAD", [], "cpu", None)

    def test_an_unknown_commit_is_refused(self):
        with pytest.raises(InputError, match="Name a commit"), versus._worktree("no-such-branch"):
            pass
