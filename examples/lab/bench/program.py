"""What all benchmarks have in common: their arguments, and the file that their results are written to."""

from __future__ import annotations

import datetime as dt
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.command_line import at_least_one, parser_of, stop, stoppable
from examples.lab.study import PACKAGES, console, finite, machine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from examples.lab.report import Table

Report = dict[str, Any]
"""``rows`` (what was measured), and how: ``program``, ``command``, ``date``, ``machine``, ``versions``."""

PEERS = ("timm", "pytorch_optimizer", "torch-optimizer", "torch2-look-ahead")


def arguments(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes: ``--rounds``, ``--json``, ``--smoke``, ``--device``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = parser_of(doc)
    result.add_argument(
        "--rounds", type=at_least_one, default=rounds, help=f"how often each thing is measured ({rounds})"
    )
    result.add_argument("--json", type=Path, help="file to write what was measured to")
    result.add_argument("--smoke", action="store_true", help="seconds: to see that it works, not what it gives")
    result.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"({device})")
    return result


def run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], list[dict[str, Any]]],
    tables: Callable[[Report], Sequence[Table]],
    then: str = "",
) -> None:
    """Measure, print the tables, and write the file; if it is stopped, say ``then``."""
    with stoppable(then):
        _run(args, measure, tables)


def _run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], list[dict[str, Any]]],
    tables: Callable[[Report], Sequence[Table]],
) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("there is no CUDA device here.")
    if args.smoke:
        args.rounds = 2
    rows = measure(args)
    if not rows:
        return
    report = {
        "program": Path(sys.argv[0]).stem,
        "command": " ".join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *_told(sys.argv[1:])]),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "rounds": args.rounds,
        "machine": machine() if args.device == "cuda" else {**machine(), "device": cpu()},
        "versions": {"python": platform.python_version(), **_versions()},
        "rows": finite(rows),
    }
    for table in tables(report):
        console.print(table.rich())
    console.print(origin(report))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def origin(report: Report) -> str:
    """When, where and with what a report was made, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    where = f"{report['machine']['device']}, {report['machine']['threads']} threads"
    return f"{report['date']}; {report['rounds']} rounds; {where}; {versions}."


def _told(argv: Sequence[str]) -> list[str]:
    """The arguments that change what is measured."""
    if "--json" not in argv:
        return list(argv)
    at = argv.index("--json")
    return [*argv[:at], *argv[at + 2 :]]


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n") if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {(names or [platform.processor()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {}
    for name in (*PACKAGES, *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
