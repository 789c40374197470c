"""Wall-clock times of calls that take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING

import torch

from examples.lab.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SHORTEST = 2e-3
"""Seconds: a call that takes less is timed several times in a row."""


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Wall-clock time of a call, the mean of ``times`` in a row; on a GPU until its work is done."""
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait()
    return (time.perf_counter() - start) / times


def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each call once a round, after a round that does not count; every round begins with the next one.

    Returns:
        Name -> seconds per call, one number for each round.
    """
    names = list(calls)
    times = {name: max(1, round(SHORTEST / max(seconds(calls[name]), 1e-9))) for name in names}
    for name in names:
        seconds(calls[name])
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in track(range(rounds), "rounds"):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(seconds(calls[name], times[name]))
    finally:
        gc.enable()
    return found


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round: what slows one call down for a while slows its neighbour down, too."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def text(found: Mapping[str, float], form: str = "{:.2f}", scale: float = 1.0) -> str:
    """A summary for a table: the median, and in brackets the quartiles."""
    median, low, high = (form.format(scale * found[name]) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
