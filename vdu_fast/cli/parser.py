"""Flags, YAML keys, defaults and help of a command, all read off dataclasses and their docstrings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from vdu_fast.errors import InputError

T = TypeVar("T")

_METAVARS = {
    "bool": "BOOL",
    "int": "N",
    "float": "X",
    "str": "TEXT",
    "tuple[int, ...]": "[N,...]",
    "tuple[int, int]": "[LOW,HIGH]",
    "list[str]": "[TEXT,...]",
}


@dataclass
class CommonOptions:
    """Options of every command that computes.

    Args:
        threads: CPU threads; null leaves the choice to torch.
        quiet: print the result, warnings and errors only.
    """

    threads: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads must be at least 1, got {self.threads}; leave it out for torch's choice.")


class _HelpFormatter(DefaultHelpFormatter):
    """Leaves types to the metavars, and defaults that say nothing unsaid."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} (required)"
        if not action.option_strings or any(action.default is quiet for quiet in (None, False, argparse.SUPPRESS)):
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(ArgumentParser):
    """A jsonargparse parser with flat flags and bare booleans, whose errors are `InputError`."""

    def add_settings(
        self, source: type | Callable[..., Any], title: str, *, skip: Sequence[str] = (), **metavars: str
    ) -> None:
        """One flag for every field of a dataclass, or every parameter of a function.

        Args:
            source: its annotations, defaults and docstring become types, defaults and help.
            title: heading in the help.
            skip: fields or parameters that are no flags.
            metavars: what the help calls the values of some.
        """
        if isinstance(source, type):
            self.add_class_arguments(source, skip=set(skip))
        else:
            self.add_function_arguments(source, skip=set(skip))
        group = self._action_groups[-1]
        group.title = title
        types = {name: parameter.annotation for name, parameter in signature(source).parameters.items()}
        for action in group._group_actions:
            annotation = types.get(action.dest, "")
            type_name = getattr(annotation, "__name__", str(annotation)).removesuffix(" | None")
            if type_name == "bool":
                # `--overwrite` alone means true; `--overwrite false` still works, so that a flag can undo a YAML key.
                action.nargs, action.const = "?", True
            action.metavar = metavars.get(action.dest, _METAVARS.get(type_name, action.metavar))

    def set_usage(self) -> None:
        """A usage line of the required options alone: the forty others are in the list below it."""
        required = [action for action in self._actions if action.required]
        flags = [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in required]
        self.usage = " ".join([self.prog, *flags, "[options]"])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(f"{_reworded(message)} See `{self.prog} --help`.") from ex


def command_parser(command: str, description: str) -> CommandParser:
    """The parser of a command with nothing but --help, --config and --print_config yet."""
    parser = CommandParser(
        prog=f"vdu-fast {command}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; later flags win")
    return parser


def _reworded(message: str) -> str:
    """jsonargparse's message in terms of flags, on one line, without Python's type names."""
    text = " ".join(message.split())
    text = re.sub(r"^Parser key \"([\w.]+)\": ?", r"--\1: ", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"Expected an? ", "expected ", text).replace(". Got value:", ", got")
    missing = re.match(r"the following arguments are required: (.*)", text)
    if missing:
        text = f"missing: {', '.join(f'--{name}' for name in missing[1].split(', '))}"
    return text if text.endswith(".") else f"{text}."


def take(source: Callable[..., T], arguments: Namespace, **others: Any) -> T:
    """Call a dataclass, or a function, with those parsed arguments that it has parameters for, and with `others`."""
    names = signature(source).parameters
    return source(**{name: value for name, value in vars(arguments).items() if name in names}, **others)
