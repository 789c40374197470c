"""Runs that leave records: each is done once, by the process that takes it first, and goes on where it stopped.

A study is a list of settings. Each becomes one line of `<name>.jsonl` when its run has ended, and only then, so that a
study which is stopped and started again does what is missing. The same command may run several times at once: the
processes share the work.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from examples.command_line import at_least_one, parser_of
from examples.lab.progress import bar, console

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.figure import Figure

    from examples.lab.report import Table

PACKAGES = ("lightning_lookahead", "lightning", "torch", "torchmetrics", "numpy")
"""Those whose versions a record holds."""

Record = dict[str, Any]
"""``settings``, ``results``, ``seconds``, ``finished``, ``versions`` and ``machine`` of one run."""

GOES_ON = "The same command goes on: what has a record is not done again."
"""What is said of a study that is stopped."""


class Study:
    """The records of one program, in a file that several processes may write to.

    Args:
        name: What the file is called.
        out: The folder that it lies in; made when runs begin.
        packages: Further ones whose versions a record holds.
    """

    def __init__(self, name: str, out: Path, packages: Sequence[str] = ()) -> None:
        self.packages = (*PACKAGES, *packages)
        self.file = out / f"{name}.jsonl"
        self.folder = out / name

    def records(self) -> list[Record]:
        """All that is in the file. A last line that was cut off does not count: its run is done again.

        Raises:
            ValueError: If another line is damaged.
        """
        if not self.file.exists():
            return []
        *lines, _ = self.file.read_text().split("\n")
        return [self._parse(number, line) for number, line in enumerate(lines, start=1)]

    def find(self, settings: object) -> Record | None:
        """The record of these settings, if there is one."""
        return self._by_settings().get(key(settings))

    def complete(self, todo: Sequence[Any], run: Callable[[Any, Path], Record]) -> list[Record]:
        """Do the runs that have no record yet, and return the records of all, in the order of the settings.

        Args:
            todo: Settings, each a dataclass of JSON's own types.
            run: Takes one of them and a folder of its own for checkpoints, and returns the results. The folder is kept
                when a run is interrupted, and removed after it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with bar(self.file.stem, len(todo), len(todo) - len(self._missing(todo))) as show:
            while missing := self._missing(todo):
                taken = 0
                for settings in missing:
                    show(len(todo) - len(self._missing(todo)))
                    with self._claim(settings) as folder:
                        if folder is None:
                            continue
                        if self.find(settings):  # done since we looked
                            shutil.rmtree(folder)
                            continue
                        taken += 1
                        self._do(settings, run, folder, f"{self.file.stem} {todo.index(settings) + 1}/{len(todo)}")
                if not taken:
                    time.sleep(1)  # another process has the rest; if it ends early, we take over
        done = self._by_settings()
        return [done[key(settings)] for settings in todo]

    def forget(self) -> None:
        """Remove the records: what they were for has been written elsewhere."""
        self.file.unlink()
        shutil.rmtree(self.folder)

    def follow(self, todo: Sequence[Any], run: Callable[[Any, Path], Record]) -> None:
        """Take part, as another process of the same runs, in what the first one completes, and leave no records.

        A run in several processes needs all of them, in every run: this one looks up what is missing before the first
        run can have ended, and takes no lock. See `examples.command_line.leads`. All of them need to see the same
        folder.
        """
        for settings in [settings for settings in todo if not self.find(settings)]:
            run(settings, self._folder(settings))

    def _folder(self, settings: object) -> Path:
        """Where the checkpoints of a run are."""
        return self.folder / hashlib.sha256(key(settings).encode()).hexdigest()[:12]

    def _missing(self, todo: Sequence[Any]) -> list[Any]:
        """The settings that have no record yet."""
        done = self._by_settings()
        return [settings for settings in todo if key(settings) not in done]

    def _by_settings(self) -> dict[str, Record]:
        return {json.dumps(record["settings"], sort_keys=True): record for record in self.records()}

    def _do(self, settings: object, run: Callable[[Any, Path], Record], folder: Path, name: str) -> None:
        console.print(f"{name}: {describe(settings)}")
        started = time.monotonic()
        results = run(settings, folder)
        seconds = round(time.monotonic() - started, 1)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        record = {
            "settings": dataclasses.asdict(settings),
            "results": finite(results),
            "seconds": seconds,  # of the last part, if the run was interrupted
            "finished": now,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in self.packages}},
            "machine": machine(),
        }
        self._append(json.dumps(record, allow_nan=False) + "\n")
        shutil.rmtree(folder)
        gc.collect()  # a Trainer and its data refer to each other, and many runs' would lie about until Python looks
        numbers = {name: f"{value:.4g}" for name, value in results.items() if isinstance(value, float)}
        console.print(f"    {', '.join(f'{name} {value}' for name, value in numbers.items())} ({seconds:.0f} s)")

    def _append(self, line: str) -> None:
        new = self.file.with_suffix(".new")  # on a full disk it is this one that is cut off
        with FileLock(self.folder / "writing.lock"), new.open("w") as file:
            old = self.file.read_text() if self.file.exists() else ""
            file.write(old[: old.rfind("\n") + 1] + line)
            file.flush()
            os.fsync(file.fileno())
            new.replace(self.file)

    @contextmanager
    def _claim(self, settings: object) -> Iterator[Path | None]:
        """A folder that no other process gets meanwhile; None if one has it. The lock ends with its process."""
        folder = self._folder(settings)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield None
            return
        try:
            folder.mkdir(exist_ok=True)
            yield folder
        finally:
            lock.release()

    def _parse(self, number: int, line: str) -> Record:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{self.file}, line {number} is damaged: delete the line, and its run will be done again."
            raise ValueError(message) from error


def key(settings: object) -> str:
    """What tells settings apart: all of them, as JSON."""
    return json.dumps(dataclasses.asdict(settings), sort_keys=True)


def finite(results: Any) -> Any:
    """The same with None for what JSON has no number for: infinite values and nan."""
    if isinstance(results, dict):
        return {name: finite(value) for name, value in results.items()}
    if isinstance(results, list | tuple):
        return [finite(value) for value in results]
    return None if isinstance(results, float) and not math.isfinite(results) else results


def describe(settings: object) -> str:
    """What is set otherwise than by default, in one line."""
    fields = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return ", ".join(f"{field.name} {value}" for field, value in fields if value != field.default)


def machine() -> Record:
    """The device, and how many threads a run has."""
    cpu = f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"device": device, "threads": torch.get_num_threads()}


def show(study: Study, tables: Sequence[Table], figure: Figure) -> None:
    """Print the tables, and save the figure beside the records."""
    for table in tables:
        console.print(table.rich())
    path = study.file.with_suffix(".png")
    figure.savefig(path)
    console.print(f"Figure: {path}")


def parser(doc: str, *, seeds: int, data: str | None = None) -> argparse.ArgumentParser:
    """The arguments that every program takes: ``--data``, ``--seeds``, ``--smoke`` and ``--out``."""
    result = parser_of(doc)
    if data is not None:
        result.add_argument("--data", default=data, help=f"a folder, or a name ({data} unless given)")
    result.add_argument(
        "--seeds", type=at_least_one, default=seeds, help=f"runs of each kind, from seeds 0, 1, ... ({seeds})"
    )
    result.add_argument(
        "--smoke", action="store_true", help="seconds on a CPU: to see that it works, not what it gives"
    )
    result.add_argument("--out", type=Path, default=Path("outputs/paper"), help="folder for records and figures")
    return result
