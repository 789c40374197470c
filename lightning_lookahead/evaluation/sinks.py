"""Where the monitor's records are shown: loggers, progress bar, a CSV file, TensorBoard's images."""

from __future__ import annotations

import csv
import warnings
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead._lightning import has_class_named

from .records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer


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
    loggers: list[Any] = [logger for logger in trainer.loggers if has_class_named(logger, ["TensorBoardLogger"])]
    if not loggers or not records or not trainer.is_global_zero:
        return
    try:
        from .plotting import plot_inner_outer  # noqa: PLC0415 (matplotlib is optional)

        figure = plot_inner_outer(records, name=name)
    except ImportError:
        warnings.warn("Lookahead: without matplotlib TensorBoard gets no picture of the window.", stacklevel=2)
        return
    for logger in loggers:
        logger.experiment.add_figure("lookahead/inner_outer", figure, global_step=records[-1].step, close=False)
