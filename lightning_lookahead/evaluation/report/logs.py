"""What loggers, the monitor and `compare` have written to a run's folder."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_lookahead.evaluation.records import Record

if TYPE_CHECKING:
    from pathlib import Path

Series = list[tuple[float, float]]
"""A metric's steps and values, by step."""

_LAST_STEP = 2**63  # beyond it a count is damaged


@dataclass(frozen=True)
class Compared:
    """What ``compare --json`` has written: metric name -> value with these weights, ``None`` if it is not finite."""

    name: str
    slow: dict[str, float | None]
    fast: dict[str, float | None]


def read_metrics(path: Path) -> dict[str, Series]:
    """The metrics in the file of a `CSVLogger`, by name; what is no number is left out.

    Raises:
        ValueError: If it has no column of steps, or is no text.
        csv.Error: If it is no table.
    """
    found: dict[str, Series] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or []):
            message = f"{path.name} has no column 'step': it is not the file of a CSVLogger."
            raise ValueError(message)
        for row in rows:
            step = _number(row["step"])
            if step is None or not math.isfinite(step):
                continue
            for name, text in row.items():
                value = _number(text) if name not in {"step", "epoch", None} else None
                if value is not None:
                    found.setdefault(name, []).append((step, value))
    return {name: sorted(series, key=lambda pair: pair[0]) for name, series in sorted(found.items())}


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None  # a list: more cells than columns
    except ValueError:
        return None


def read_events(folder: Path) -> dict[str, Series]:
    """The scalars in a folder's TensorBoard event files, by name.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed.
    """
    events = import_module("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(folder), {events.SCALARS: 0}, purge_orphaned_data=False)  # 0: all
    accumulator.Reload()
    return {
        name: sorted((event.step, event.value) for event in accumulator.Scalars(name))
        for name in sorted(accumulator.Tags()[events.SCALARS])
        if name != "epoch"
    }


def read_records(path: Path) -> list[Record]:
    """The monitor's records in its CSV file.

    Raises:
        ValueError: If it is not such a file.
        csv.Error: If it is no table.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if next(rows, None) != list(Record._fields):
            message = f"{path.name} does not begin with {','.join(Record._fields)}: it is not the monitor's file."
            raise ValueError(message)
        return [record_of(int(step), weights, value, loss or None) for step, weights, value, loss in rows]


def record_of(step: Any, weights: Any, value: Any, loss: Any) -> Record:
    """A record that was read from a file.

    Raises:
        ValueError: If it is damaged.
    """
    if type(step) is not int or not 0 <= step < _LAST_STEP or weights not in {"inner", "outer"}:
        message = f"The monitor's record {(step, weights)!r} is damaged: it must be a number of steps, inner or outer."
        raise ValueError(message)
    return Record(step, weights, float(value), None if loss is None else float(loss))


def read_compared(path: Path) -> Compared | None:
    """What ``compare --json`` has written; ``None`` if the file holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    sets = [found.get(which) for which in ("slow", "fast")] if isinstance(found, dict) else [None]
    if not all(isinstance(own, dict) and all(map(_is_value, own.values())) for own in sets):
        return None
    return Compared(path.name, *sets)


def _is_value(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
