"""What every program of the examples shares: arguments that are checked, and an early end in one line.

Imports nothing that takes time. The programs of this folder find it as `command_line`, the others as
`examples.command_line`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 128 + signal.SIGINT
"""What a shell gives for a program that Ctrl-C has ended."""


@contextmanager
def stoppable(then: str = "") -> Iterator[None]:
    """Around a program, or before its ``main`` as a decorator: Ctrl-C ends it with one line and exit code 130.

    A Trainer that is interrupted lets its callbacks clean up and exits with code 1: that is the same end.

    Args:
        then: How to go on, for the line.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not cut the end short
        if leads():
            print(f"{_name()}: stopped. {then}".strip(), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def stop(message: object) -> NoReturn:
    """End the program with one line."""
    sys.exit(f"{_name()}: {message}")


def leads() -> bool:
    """Whether this process is the first of those that train together, and so the one that speaks and keeps records.

    Asked before there is a process group, so it goes by what torchrun, Lightning and SLURM tell the processes.
    """
    ranks = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a program's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least_one(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        message = f"{number}: must be at least 1"
        raise argparse.ArgumentTypeError(message)
    return number


def _name() -> str:
    return Path(sys.argv[0]).name
