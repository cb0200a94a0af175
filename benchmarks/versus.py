"""This tree beside another commit, question by question, in turns.

Both answer the questions of this tree: only the package and its native libraries are the other commit's. Processes
alternate, so that what slows the machine down slows both. Nothing is compared while the tests of the ops are red: a
wrong result is fast soon.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from vdu_fast.benchmarks.case import Line, Question
from vdu_fast.benchmarks.measure import spread
from vdu_fast.errors import InputError

ROOT = Path(__file__).parents[1]
ROUNDS = 3
SLOWER = 1.05  # beyond the noise of ROUNDS alternations on a quiet machine
# What the ops are held to; the whole suite would take longer than most comparisons.
TESTS = ("tests/test_parity.py", "tests/test_native.py", "tests/test_dispatch.py", "tests/test_variational_step.py")
# The package of a tree, with the questions of this one: {package} comes first, so that its own questions stay unseen.
CHILD = """
import sys
# An editable install would serve from its own tree whatever the other one lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", str(finder))]
sys.path.insert(0, {tree!r})
import vdu_fast
vdu_fast.__path__[:] = [{tree!r} + "/vdu_fast", {questions!r}, {tree!r}]
import json, torch
from vdu_fast.benchmarks.case import load_questions
from vdu_fast.benchmarks.suite import ask, make_setting
if {threads!r}:
    torch.set_num_threads({threads!r})
for answer in ask([load_questions()[{name!r}]], make_setting(torch.device({device!r}), quick=False)):
    print("LINES " + json.dumps(answer.lines))
"""


def compare(revision: str, questions: Iterable[Question], device: str, threads: int | None) -> int:
    """Print the medians of both; returns 1 where ours of this tree is slower by more than the noise, else 0."""
    _refuse_red_tests()
    slower = []
    with _worktree(revision) as base, tempfile.TemporaryDirectory() as alias:
        (Path(alias) / "benchmarks").symlink_to(ROOT / "benchmarks")
        for question in questions:
            print(f"\n{question.name}", flush=True)
            times: dict[str, dict[str, list[float]]] = {revision: {}, "this tree": {}}
            for _ in range(ROUNDS):
                for name, tree in ((revision, base), ("this tree", ROOT)):
                    for line in _lines(tree, Path(alias), question.name, device, threads):
                        if "milliseconds" in line:
                            times[name].setdefault(line["implementation"], []).append(line["milliseconds"])
            slower += _told(question.name, times[revision], times["this tree"])
    print("\n".join(f"SLOWER  {each}" for each in slower))
    return 1 if slower else 0


def _told(question: str, base: dict[str, list[float]], here: dict[str, list[float]]) -> list[str]:
    """Print base against here for every implementation that both have; returns those of ours that are slower."""
    slower = []
    for name in (n for n in here if n in base):
        before, now = statistics.median(base[name]), statistics.median(here[name])
        noise = max(spread(base[name]), spread(here[name]))
        print(
            f"  {name:40} {before:10.3f} ms -> {now:10.3f} ms  {before / now:5.2f} x  +-{100 * noise:.0f}%", flush=True
        )
        if name.startswith(("vdu_fast", "cuda", "triton")) and now > max(SLOWER, 1 + 2 * noise) * before:
            slower.append(f"{question}, {name}: {now / before:.2f} x the time")
    return slower


def _refuse_red_tests() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *TESTS], cwd=ROOT)
    if done.returncode:
        raise InputError("--base: the tests of the ops fail; mend them first, a wrong result is not timed.")


@contextlib.contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    """The other commit in a folder of its own, built, and removed after."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        added = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), revision], capture_output=True, text=True
        )
        if added.returncode:
            raise InputError(
                f"--base {revision}: {added.stderr.strip()}. Name a commit, branch or tag of this repository."
            )
        try:
            print(f"building {revision}", flush=True)
            path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            # What cannot be built must not be replaced by what is installed.
            needed = {"PATH": path, "VDU_FAST_BUILD_CPU": "1"}
            built = subprocess.run(build, cwd=tree, env=os.environ | needed, capture_output=True, text=True)
            if built.returncode:
                raise InputError(f"--base {revision} cannot be built: {built.stderr.strip()[-500:]}")
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], capture_output=True)


def _lines(tree: Path, alias: Path, name: str, device: str, threads: int | None) -> list[Line]:
    code = CHILD.format(tree=str(tree), questions=str(alias), name=name, device=device, threads=threads)
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", code], cwd=alias, env=environment, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("LINES ")]
    if "ModuleNotFoundError: No module named 'vdu_fast." in done.stderr:
        missing = done.stderr.strip().splitlines()[-1].rsplit(" ", 1)[-1]
        raise InputError(f"--base: that commit has no {missing}, which the questions need. Compare with a later one.")
    if done.returncode or not found:
        raise InputError(f"--base: {tree} cannot answer {name!r}: {done.stderr.strip()[-500:]}")
    return json.loads(found[-1].removeprefix("LINES "))
