"""`write_report`, and ``python -m lightning_lookahead report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, NoReturn

from .page import page
from .run import is_checkpoint, one_line, read_run

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence


def write_report(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write a page about a run: its settings, its counts, the monitor's windows and what was logged.

    The page is one HTML file that loads nothing. Of checkpoints no object but tensors and plain values is read, and the
    module's class is not needed. A file that cannot be read is named on the page with the reason.

    Args:
        run: A log folder, ``lightning_logs/version_0`` say, with ``checkpoints`` in it; or one checkpoint, a file or a
            folder of shards.
        out: The file to write; by default ``report.html`` in the log folder, or beside the checkpoint. A file that is
            there is replaced if its name ends in ``.html`` or ``.htm``.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it is no run, or a checkpoint that is damaged or was saved without `LookaheadCallback`; if
            ``out`` is a file of another kind.
        pickle.UnpicklingError: If it is a checkpoint that holds objects which ``weights_only=True`` does not allow.
        OSError: If the page cannot be written.

    Example::

        write_report("lightning_logs/version_0")
    """
    if not str(run):
        message = "run is empty: give a log folder, lightning_logs/version_0 say, or a checkpoint."
        raise ValueError(message)
    path = Path(run)
    found = read_run(path)
    target = Path(out) if out is not None else (path.parent if is_checkpoint(path) else path) / "report.html"
    if target.is_file() and target.suffix.lower() not in {".html", ".htm"}:
        message = f"out={str(target)!r} is there and is no page: give a new file, or one whose name ends in .html."
        raise ValueError(message)
    target.write_text(page(found), encoding="utf-8", errors="replace")
    return target


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help shows what can be given)\n")


def main(arguments: Sequence[str]) -> None:
    """Run the command and print the page's path; refuse in one line, with exit code 2."""
    parser = _OneLineParser(
        prog="python -m lightning_lookahead report",
        description="Write a page about a run: settings, counts, the monitor's windows and what was logged.",
    )
    parser.add_argument("run", metavar="RUN", help="a log folder, lightning_logs/version_0 say, or a checkpoint")
    parser.add_argument("--out", metavar="PATH", help="the file to write (default: report.html in or beside RUN)")
    given = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{write_report(given.run, given.out)}\n")
    except (OSError, ValueError, UnpicklingError) as error:
        parser.exit(2, f"error: {one_line(error)}\n")
