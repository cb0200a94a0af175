"""`vdu-fast doctor`."""

from __future__ import annotations

from itertools import groupby

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vdu_fast import doctor
from vdu_fast.cli.parser import CommandParser, command_parser


def build_parser() -> CommandParser:
    parser = command_parser(
        "doctor",
        "Show versions, devices and the backend of every op, and check the installation. Exits with 1 when a check "
        "fails.",
    )
    parser.usage = "vdu-fast doctor"
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    console = Console(highlight=False)
    _print_pairs(console, "versions", doctor.versions())
    _print_pairs(console, "devices", doctor.devices())
    if build := doctor.build():
        _print_pairs(console, "native code", build)
    _print_routes(console)
    checks = doctor.checks()
    table = _table("checks")
    for check in checks:
        verdict = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        table.add_row(Text(check.name), verdict, Text(check.found))
    console.print(table)
    return 0 if all(check.passed for check in checks) else 1


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 3, 0, 0))


def _print_pairs(console: Console, title: str, pairs: dict[str, str]) -> None:
    table = _table(title)
    for name, value in pairs.items():
        table.add_row(Text(name), Text(value))
    console.print(table, end="\n\n")


def _print_routes(console: Console) -> None:
    table = _table("backends")
    reasons = []
    for device, routes in groupby(doctor.routes(), key=lambda route: route.device):
        for route in routes:
            table.add_row(Text(route.op), Text(device), Text(route.backend))
            if route.reason:
                reasons.append(f"Nothing faster on {device}: {route.reason}.")
    console.print(table)
    for reason in dict.fromkeys(reasons):
        console.print(Text(reason))
    console.print()
