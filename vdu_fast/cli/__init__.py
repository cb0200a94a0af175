"""The command line `vdu-fast`: one module per command, imported only when that command runs.

Exit codes: 0 done, 1 `doctor` found something wrong or a benchmark failed, 2 the input was wrong (one message, no
traceback), 130 interrupted (what was reached is saved, and the message is the command that goes on from there).
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

from vdu_fast import __version__
from vdu_fast.errors import InputError

COMMANDS = {
    "demo": "forget one handwritten digit with a model that comes with the package; takes about a minute",
    "pretrain": "train a diffusion model on your pictures, and record its posterior",
    "posterior": "estimate the posterior of a model from its checkpoints, or from the model alone (--fisher)",
    "unlearn": "make a model forget, from pictures of what must go",
    "sweep": "find the settings of unlearn that suit a model, from the same pictures alone",
    "profile": "show where the time and the memory of unlearning go, and what would help",
    "evaluate": "measure what was forgotten and what it cost, and write a report",
    "compare": "run other unlearning methods beside this one at equal cost, and write a table",
    "benchmark": "measure the fast ops on this machine against torch without them",
    "tune": "time block sizes of the Triton kernels on a GPU and remember the fastest",
    "doctor": "show versions, devices and backends, and check the installation",
}


def help_text() -> str:
    """The top-level help. Plain text, because a parser that knew every option would have to import torch first."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return f"""usage: vdu-fast COMMAND [options]

Make a trained diffusion model forget a class of pictures.

commands:
{commands}

options:
  -h, --help  show this text; `vdu-fast COMMAND --help` lists the options of a command
  --version   show the version

Start with `vdu-fast demo`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name, None takes sys.argv."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        # The user's disk, not our mistake; any other system error deserves its traceback.
        full = (errno.ENOSPC, errno.EDQUOT)
        place = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
        if error.errno not in full + place:
            raise
        remedy = "Free some space, or name another folder" if error.errno in full else "Name another place"
        return _fail(f"{error.filename or 'writing'}: {error.strerror}. {remedy}.")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"vdu-fast {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise InputError(
            f"there is no {kind} {name!r}; choose a command: {', '.join(COMMANDS)}. See `vdu-fast --help`."
        )
    module = importlib.import_module(f"vdu_fast.cli.{name}")
    try:
        parsed = module.build_parser().parse_args(rest)
    except SystemExit as stop:  # --help and --print_config
        return int(stop.code or 0)
    return module.run(parsed, ["vdu-fast", *arguments])


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
