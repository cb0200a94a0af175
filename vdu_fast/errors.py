"""The one error type that means "the input was wrong", as opposed to "the program is wrong"."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user.

    The message names the argument, what came, what is accepted and what to do next. The command line prints it without
    a traceback and exits with status 2; from Python it is an ordinary ``ValueError``.
    """
