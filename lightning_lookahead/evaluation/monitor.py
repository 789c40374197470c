"""`InnerOuterMonitor`: a metric after every inner step and every sync, as in the paper's Figure 10."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchmetrics import Metric

from lightning_lookahead._arguments import check_integer

from . import sinks
from .batches import Given, check_repeatable, held_out, ready, stage
from .isolation import isolated
from .measure import Evaluation, classify
from .records import Record
from .window import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning.pytorch import LightningModule, Trainer

    from lightning_lookahead.outer_loop.slow_weights import SlowWeights


class InnerOuterMonitor:
    """Evaluates held-out data after every inner step of a window, at a sync before and after it.

    Given to `LookaheadCallback` as ``monitor``. It changes nothing: weights, random numbers, buffers, modes, metrics of
    the module and the order of the data are as in a run without it. Each inner step of the window costs one pass
    over the held-out data, a sync two. Under DDP and FSDP each rank evaluates its part and the metric is reduced once.

    Args:
        updates: Inner steps in a window; at least 1.
        start: Inner steps before the window; by default it begins where training begins. If the weights were synced
            just there, phi is evaluated first.
        batches: How many held-out batches to take at most, on each rank; they stay on the device. By default all that
            the Trainer validates on.
        metric: Any torchmetrics metric that gives one number; by default multiclass accuracy.
        step: A function of the module and a batch that returns prediction and target for the metric and, if it
            returns three things, a mean loss. By default a batch ``(x, y)`` gives ``module(x), y``, and the loss is
            their cross entropy if the metric is not given either. What it logs goes nowhere.
        data: The held-out batches, as a loader or a list; by default from the Trainer's validation loaders.
        every_n_syncs: Begin another window so many syncs after a window began, all through training; at least 1.
        save_csv: Write the records to ``inner_outer.csv`` in the Trainer's ``log_dir`` as they come.

    Raises:
        TypeError: If ``metric`` is no torchmetrics metric.
        ValueError: If a number is out of range; when training starts, if there is no held-out data or if metric and
            step do not fit it.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_lookahead import LookaheadCallback
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> loader = DataLoader(TensorDataset(torch.ones(12, 4), torch.arange(12) % 3), batch_size=2)
        >>> monitor = InnerOuterMonitor(updates=4, data=loader)
        >>> trainer = Trainer(
        ...     callbacks=[LookaheadCallback(k=2, monitor=monitor)], max_steps=6, logger=False, accelerator="cpu",
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(Classifier(), loader)
        >>> [(record.step, record.weights) for record in monitor.history]
        [(0, 'outer'), (1, 'inner'), (2, 'inner'), (2, 'outer'), (3, 'inner'), (4, 'inner'), (4, 'outer')]

    Source: Zhang, Lucas, Hinton, Ba 2019, Figure 10.
    """

    def __init__(  # noqa: PLR0917
        self,
        updates: int = 60,
        start: int | None = None,
        batches: int | None = None,
        metric: Metric | None = None,
        step: Callable[..., Any] | None = None,
        data: Iterable[Any] | None = None,
        every_n_syncs: int | None = None,
        save_csv: bool = False,  # noqa: FBT001, FBT002 (YAML and the command line name every argument)
    ) -> None:
        if metric is not None and not isinstance(metric, Metric):
            message = f"metric={metric!r} is a {type(metric).__name__}; it must be a torchmetrics Metric."
            raise TypeError(message)
        check_repeatable("data", data)
        self.updates = check_integer(updates, "updates", 1)
        self.start = None if start is None else check_integer(start, "start", 0)
        self.batches = None if batches is None else check_integer(batches, "batches", 1)
        self.every_n_syncs = None if every_n_syncs is None else check_integer(every_n_syncs, "every_n_syncs", 1)
        self.metric, self.step, self.data, self.save_csv = metric, step, data, save_csv
        self.reset()

    def reset(self) -> None:
        """Begin anew, with an empty history."""
        self.history: list[Record] = []
        """The evaluations of this run, in order; those before a resume come from the checkpoint."""
        self._window = Window(self.updates, self.start, self.every_n_syncs)
        self._evaluation = Evaluation(self.metric, self.step or classify)
        self._ready: list[Any] = []  # held-out batches on the device, while they are needed
        self._steps = 0  # inner steps as of the last look
        self._published = 0  # records that were shown
        self._file: Path | None = None

    # -- one fit: called by the callback, with the slow weights of the first optimizer

    def begin(self, trainer: Trainer, slow: SlowWeights) -> None:
        """Evaluate one batch, so that errors come before training; open the window if it is time."""
        self._steps, self._published = slow.steps, len(self.history)
        self._window.begin(slow.steps, slow.syncs)
        self._evaluation.measure(trainer, self._held_out(trainer, 1))
        if self.save_csv and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a part of the Trainer
            self._file = Path(trainer.log_dir or trainer.default_root_dir) / "inner_outer.csv"
            self._write(trainer, self.history, new=True)
        if self.history and self.history[-1].step >= slow.steps:
            return  # a resumed run: this step was evaluated before it was saved
        if slow.cycles.at_sync:
            self.after_sync(trainer, slow)
        elif self._window.observe_step(slow.steps, slow.syncs):  # the run was stopped before it was evaluated
            self._evaluate(trainer, "inner")

    def after_step(self, trainer: Trainer, slow: SlowWeights) -> None:
        """Evaluate theta if an inner step was taken and belongs to a window."""
        before, self._steps = self._steps, slow.steps
        if self._steps != before and self._window.observe_step(self._steps, slow.syncs):
            self._evaluate(trainer, "inner")

    def after_sync(self, trainer: Trainer, slow: SlowWeights) -> None:
        """Evaluate phi if the sync belongs to a window."""
        if self._window.observe_sync(self._steps, slow.syncs):
            self._evaluate(trainer, "outer")

    def publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show new records; draw a window that is over."""
        records = self._send(trainer)
        if not trainer.barebones:
            sinks.show(pl_module, records, self._evaluation.name)
        finished, self._window.finished = self._window.finished, None
        if finished is not None:
            self._draw(trainer, finished)
        if self._window.is_over(self._steps):
            self._ready = []

    def let_go(self) -> None:
        """Drop the data: nothing more is evaluated in this fit."""
        self._ready = []

    def end(self, trainer: Trainer) -> None:
        """Send new records, drop the data, and draw a window that training ended in."""
        self._send(trainer)
        self.let_go()
        if self._window.is_open(self._steps):
            self._draw(trainer, self._window.steps)

    # -- looking

    def _evaluate(self, trainer: Trainer, weights: Literal["inner", "outer"]) -> None:
        last = self.history[-1] if self.history else None
        if last is not None and (last.step, last.weights) == (self._steps, weights):  # seen before the run was saved
            return
        self._ready = self._ready or self._held_out(trainer, self.batches)
        self.history.append(Record(self._steps, weights, *self._evaluation.measure(trainer, self._ready)))

    def _held_out(self, trainer: Trainer, limit: int | None) -> list[Any]:
        """The first held-out batches, on the device."""
        with isolated(trainer.lightning_module), stage(trainer, training=False):
            loaders = Given(self.data) if self.data is not None else held_out(trainer)
            with isolated(trainer.lightning_module, loaders.parts):
                batches = list(ready(trainer, loaders, limit))
        if not batches:
            message = (
                "InnerOuterMonitor has no held-out data: the Trainer validates on none. Give the fit validation data"
                " or the monitor batches of its own, data=."
            )
            raise ValueError(message)
        return batches

    # -- showing

    def _send(self, trainer: Trainer) -> list[Record]:
        """Send new records to the loggers and the file; return them."""
        records, self._published = self.history[self._published :], len(self.history)
        sinks.log(trainer, records, self._evaluation.name)
        self._write(trainer, records, new=False)
        return records

    def _write(self, trainer: Trainer, records: list[Record], *, new: bool) -> None:
        if self._file is not None and trainer.is_global_zero and not sinks.write(self._file, records, new=new):
            self._file = None

    def _draw(self, trainer: Trainer, steps: range) -> None:
        sinks.draw(trainer, [record for record in self.history if record.step in steps], self._evaluation.name)

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        """The history and the place of the window, for a checkpoint: numbers and strings only."""
        return {"history": [list(record) for record in self.history], "window": self._window.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the monitor of a saved run was."""
        self.history[:] = [Record(*record) for record in state_dict["history"]]
        self._window.load_state_dict(state_dict["window"])
