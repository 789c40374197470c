"""The monitor's records, and inner loops in them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Record(NamedTuple):
    """One evaluation by an `InnerOuterMonitor`.

    Attributes:
        step: Inner steps taken so far.
        weights: ``"inner"``: theta after the step; ``"outer"``: phi after a sync at the step, when theta is phi.
        value: The metric.
        loss: The mean loss; ``None`` if there is none.
    """

    step: int
    weights: Literal["inner", "outer"]
    value: float
    loss: float | None


class InnerLoop(NamedTuple):
    """The metric around one inner loop: of phi before it, of theta at its end, of phi after the sync."""

    before: float
    end: float
    after: float

    @property
    def fell(self) -> bool:
        """Whether the metric was lower at the end of the loop than before it."""
        return self.end < self.before

    @property
    def raised(self) -> bool:
        """Whether the metric was higher after the sync than at the end of the loop."""
        return self.after > self.end

    @property
    def recovered(self) -> bool:
        """Whether the sync raised the metric to its value before the loop, or higher."""
        return self.raised and self.after >= self.before


def windows(history: Iterable[Record]) -> list[list[Record]]:
    """The windows in a history: between two of them steps are missing."""
    found: list[list[Record]] = []
    for record in history:
        if not found or record.step - found[-1][-1].step > 1:
            found.append([])
        found[-1].append(record)
    return found


def segments(window: Iterable[Record]) -> list[list[Record]]:
    """The inner loops of a window as lines: from the sync before a loop, if the window has it, to the loop's end."""
    found: list[list[Record]] = [[]]
    for record in window:
        if record.weights == "outer":
            found.append([])
        found[-1].append(record)
    return [segment for segment in found if segment and segment[-1].weights == "inner"]


def inner_loops(history: Iterable[Record]) -> list[InnerLoop]:
    """What each whole inner loop did to the metric, and what the sync after it did.

    Args:
        history: ``monitor.history``, or a part of it. Loops that begin or end outside of a window are left out.

    Example:
        >>> history = [Record(0, "outer", 0.9, None), Record(1, "inner", 0.8, None), Record(1, "outer", 0.95, None)]
        >>> inner_loops(history)
        [InnerLoop(before=0.9, end=0.8, after=0.95)]

    Source: Zhang, Lucas, Hinton, Ba 2019, Figure 10.
    """
    records = list(history)
    outer = [index for index, record in enumerate(records) if record.weights == "outer"]
    return [
        InnerLoop(records[first].value, records[last - 1].value, records[last].value)
        for first, last in pairwise(outer)
        if records[last - 1].weights == "inner" and records[first + 1].step == records[first].step + 1
    ]
