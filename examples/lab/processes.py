"""Commands that a program starts and that end with it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SHOWN = 4000
"""Characters of what a command said that an error shows."""


def run(command: Sequence[str], log: Path, **variables: str) -> None:
    """Run a command, which says what it says to a file.

    It has a session of its own: Ctrl-C reaches this program alone, which asks the command to end and waits for it. So
    torchrun has the time to end its ranks, which have sessions of their own, too.

    Args:
        command: What to start.
        log: The file.
        variables: Of its environment, besides those of this program.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    environment = {**os.environ, **variables}
    with (
        log.open("wb") as file,
        subprocess.Popen(  # noqa: S603
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait()
        finally:
            process.terminate()
    if code:
        message = f"{command} ended with code {code}:\n{log.read_text(errors='replace')[-SHOWN:]}"
        raise RuntimeError(message)
