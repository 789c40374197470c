"""All that the files of a run say. A file that cannot be read is noted and stops nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from lightning_lookahead.evaluation.records import Record

from .logs import Compared, Series, read_compared, read_events, read_metrics, read_records
from .saved import Saved, read_saved

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

_MONITORED = re.compile(r"(?:.*-)?lookahead/(inner|outer)_(.+)", re.DOTALL)  # a logger's prefix ends in "-"
_LONGEST = 20_000  # characters of a text that are shown


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        name: The last two parts of its path.
        saved: Its checkpoints, by inner steps.
        series: Logged metrics by name.
        history: The monitor's records, from the source that has most of them.
        history_from: That source.
        metric: What the monitor's metric is called.
        compared: What ``compare --json`` has written.
        texts: File name -> hyperparameters or configuration, as they are in the file.
        problems: Files that could not be read, each with the reason.
        hints: What would let the report show more.
    """

    name: str
    saved: list[Saved] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    history_from: str = ""
    metric: str = "metric"
    compared: list[Compared] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def newest(self) -> Saved | None:
        """The checkpoint with most inner steps."""
        return self.saved[-1] if self.saved else None

    def attempt(self, path: Path, read: Callable[..., T], *arguments: Any) -> T | None:
        """What ``read`` makes of a file; ``None``, and a note of the reason, if it fails."""
        try:
            return read(path, *arguments)
        except Exception as error:  # noqa: BLE001 (whatever a damaged file raises)
            self.note(path, error)
            return None

    def note(self, path: Path, error: Exception) -> None:
        """Note that a file could not be read, and why."""
        self.problems.append((path.name, one_line(error).replace(str(path), path.name)))


def read_run(path: Path) -> Run:
    """Read a log folder, or a checkpoint.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If it is no run, or a checkpoint that cannot be read.
        pickle.UnpicklingError: If it is a checkpoint with objects that ``weights_only=True`` does not allow.
    """
    if not path.exists():
        message = f"run={str(path)!r} does not exist: give a log folder, lightning_logs/version_0 say, or a checkpoint."
        raise FileNotFoundError(message)
    run = Run("/".join(path.resolve().parts[-2:]))
    if is_checkpoint(path):
        run.saved = [read_saved(path, path.name)]
        run.history, run.history_from = run.saved[0].history, path.name
        return run
    checkpoints = sorted(p for pattern in ("*.ckpt", "checkpoints/*.ckpt") for p in path.glob(pattern) if p.exists())
    saved = [run.attempt(part, read_saved, str(part.relative_to(path))) for part in checkpoints]
    run.saved = sorted((part for part in saved if part is not None), key=lambda part: part.steps)
    _read_logs(run, path)
    _take_history(run, path / "inner_outer.csv")
    if not (checkpoints or run.series or run.history or run.compared or run.texts or run.problems or run.hints):
        _refuse(path)
    if not checkpoints:
        run.hints.append("There is no checkpoint here. Settings and counts are in checkpoints.")
    return run


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint, or of no run: a file, or a folder of shards."""
    return not path.is_dir() or (path / "meta.pt").exists()


def _read_logs(run: Run, path: Path) -> None:
    metrics = path / "metrics.csv"
    if metrics.is_file():
        run.series = run.attempt(metrics, read_metrics) or {}
    events = sorted(path.glob("events.out.tfevents.*"))
    if events:
        try:
            run.series = {**read_events(path), **run.series}
        except ModuleNotFoundError:
            run.hints.append("There are TensorBoard event files. To see what they hold: pip install tensorboard")
        except Exception as error:  # noqa: BLE001 (whatever a damaged file raises)
            run.note(events[0], error)
    compared = (run.attempt(part, read_compared) for part in sorted(path.glob("*.json")) if part.is_file())
    run.compared = [part for part in compared if part is not None]
    for name in ("hparams.yaml", "config.yaml"):
        if (path / name).is_file():
            text = run.attempt(path / name, lambda part: part.read_text(encoding="utf-8", errors="replace"))
            if text and text.strip() != "{}":
                run.texts[name] = text[:_LONGEST]


def _take_history(run: Run, path: Path) -> None:
    """Take the records from where most are: the monitor's file, a checkpoint, the logs."""
    logged: list[Record] = []
    for name, series in run.series.items():
        found = _MONITORED.fullmatch(name)
        if found and run.metric in {"metric", found[2]}:
            run.metric = found[2]
            which: Literal["inner", "outer"] = "inner" if found[1] == "inner" else "outer"
            logged += [Record(int(step), which, value, None) for step, value in series]
    sources = [
        ("inner_outer.csv", (run.attempt(path, read_records) if path.is_file() else None) or []),
        *((saved.name, saved.history) for saved in reversed(run.saved)),
        ("the logs", sorted(logged, key=lambda record: (record.step, record.weights))),
    ]
    run.history_from, run.history = max(sources, key=lambda source: len(source[1]))
    run.series = {name: series for name, series in run.series.items() if not _MONITORED.fullmatch(name)}


def _refuse(path: Path) -> NoReturn:
    inside = sorted(part.name for part in path.glob("version_*") if part.is_dir())
    way = "Give a log folder, lightning_logs/version_0 say, or a checkpoint."
    if inside:
        way = f"Give one of the runs in it: {', '.join(inside[:5])}."
    message = f"run={str(path)!r} holds neither logs nor checkpoints. {way}"
    raise ValueError(message)


def one_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
