"""What the monitor has seen, and where it is shown: loggers, progress bar, a CSV file, TensorBoard's images."""

from __future__ import annotations

import csv
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lightning_lookahead._lightning import is_a

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer


class Record(NamedTuple):
    """One evaluation by an `InnerOuterMonitor`.

    Attributes:
        step: Inner steps taken so far.
        weights: ``"inner"``: theta after that step; ``"outer"``: phi after a sync at that step, and theta with it.
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
        """Whether the sync made it higher than at the end of the loop."""
        return self.after > self.end

    @property
    def recovered(self) -> bool:
        """Whether the sync raised it to where it was before the loop, or higher."""
        return self.raised and self.after >= self.before


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


def log(trainer: Trainer, records: Sequence[Record], name: str) -> None:
    """Send records to every logger, under the number of inner steps."""
    for record in records:
        for logger in trainer.loggers:
            logger.log_metrics({f"lookahead/{record.weights}_{name}": record.value}, step=record.step)


def show(pl_module: LightningModule, records: Sequence[Record], name: str) -> None:
    """Show the latest values of both kinds in the progress bar."""
    for key, value in {f"lookahead/{record.weights}_{name}": record.value for record in records}.items():
        pl_module.log(key, torch.tensor(value), prog_bar=True, logger=False)


def write(path: Path, records: Sequence[Record], *, new: bool) -> bool:
    """Append records to a CSV file, or write it anew; return whether that went well. A run goes on without its file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if new else "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(Record._fields)
            writer.writerows(records)
    except OSError as error:
        warnings.warn(f"Lookahead: the monitor's records are no longer written: {error}.", stacklevel=2)
        return False
    return True


def draw(trainer: Trainer, records: Sequence[Record], name: str) -> None:
    """Give every TensorBoard logger the picture of a window."""
    loggers: list[Any] = [logger for logger in trainer.loggers if is_a(logger, ["TensorBoardLogger"])]
    if not loggers or not records or not trainer.is_global_zero:
        return
    try:
        from lightning_lookahead.plotting import plot_inner_outer  # noqa: PLC0415 (matplotlib is optional)

        figure = plot_inner_outer(records, name=name)
    except ImportError:
        warnings.warn("Lookahead: without matplotlib TensorBoard gets no picture of the window.", stacklevel=2)
        return
    for logger in loggers:
        logger.experiment.add_figure("lookahead/inner_outer", figure, global_step=records[-1].step, close=False)
