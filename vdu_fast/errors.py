"""The one error type that means "the input was wrong", as opposed to "the program is wrong"."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad input from the user.

    The message names the argument, what came, what is accepted and what to do next. The command line prints it without
    a traceback and exits with status 2; from Python it is an ordinary ``ValueError``.
    """


def check_choices(settings: Any) -> None:
    """InputError where a field of a dataclass that is annotated as a Literal holds something else."""
    for name, annotation in get_type_hints(type(settings)).items():
        if get_origin(annotation) is Literal and getattr(settings, name) not in get_args(annotation):
            accepted = ", ".join(get_args(annotation))
            raise InputError(f"{name} must be one of {accepted}, got {getattr(settings, name)!r}.")
