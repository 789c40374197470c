"""What does Lookahead add to a training step between two syncs, and does it grow with the number of tensors?

    python examples/benchmarks/ordinary_steps.py

The same fit with the callback and without it, for a module with one trained tensor and one with many. No sync comes
before the end of the fit, the optimizer's step does nothing, and the loss is of one parameter: so a step is little more
than what the Trainer does itself. All parameters have gradients, as in training. A Trainer takes time for the hooks of
any callback, also of one that has none: that is measured beside. On a GPU one more fit raises an error if what the
callback does on an ordinary step waits for the device.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from examples.lab.bench.fits import trainer
from examples.lab.bench.parameters import parameters
from examples.lab.bench.program import arguments, run
from examples.lab.bench.timing import summary, take_turns, text
from examples.lab.progress import track
from examples.lab.report import Table
from examples.lab.training import quietly
from lightning_lookahead import LookaheadCallback, SlowWeights

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from examples.lab.bench.program import Report

TENSORS = (1, 1000)
SHAPE = (10,)
STEPS, SMOKE_STEPS = 2000, 50
NEVER = 10**9
"""Inner steps to the first sync: more than there are."""
MOST = 5
"""Microseconds that a step may take longer than with a callback without hooks of its own."""
WITH, EMPTY, WITHOUT = "with", "empty", "without"


class Still(Optimizer):
    """Takes steps that do nothing, and lets gradients be."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        super().__init__(trained, {"lr": 1.0})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class Tensors(LightningModule):
    """Many small parameters, and the first one's sum for a loss."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.trained = nn.ParameterList(torch.zeros(SHAPE) for _ in range(count))

    def on_train_start(self) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.trained[0].sum()

    def configure_optimizers(self) -> Optimizer:
        return Still(list(self.parameters()))


class Clock(Callback):
    """When each batch began."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Seconds from one batch to the next, the median."""
        return statistics.median(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


class Strict(LookaheadCallback):
    """CUDA raises an error if the hooks on the optimizer or the callback's own wait for the device."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(_forbid)
        optimizer.register_step_post_hook(_forbid)
        super().on_fit_start(trainer, pl_module)  # registers hooks, which come between these
        optimizer.register_step_pre_hook(_allow)
        optimizer.register_step_post_hook(_allow)

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        _forbid()
        super().on_train_batch_end(*args)
        _allow()

    @override
    def on_exception(self, *args: Any) -> None:
        _allow()
        super().on_exception(*args)


def _forbid(*_: object) -> None:
    torch.cuda.set_sync_debug_mode("error")


def _allow(*_: object) -> None:
    torch.cuda.set_sync_debug_mode("default")


def fit(count: int, steps: int, device: str, *callbacks: Callback) -> None:
    """Train a module of so many tensors for so many steps."""
    trainer(device, callbacks, max_epochs=1).fit(Tensors(count), DataLoader(range(steps), batch_size=None))


def step_time(count: int, kind: str, args: argparse.Namespace) -> float:
    """Seconds of the median step of one fit.

    Raises:
        RuntimeError: If the callback did not count the steps, or a sync came.
    """
    steps = SMOKE_STEPS if args.smoke else STEPS
    clock, lookahead = Clock(), LookaheadCallback(NEVER)
    gc.collect()  # what earlier fits left
    more = {WITH: [lookahead], EMPTY: [Callback()], WITHOUT: []}
    fit(count, steps, args.device, clock, *more[kind])
    for slow in lookahead.slow_weights:
        if (slow.steps, slow.syncs) != (steps, 0):
            message = f"{slow.steps} steps were counted and {slow.syncs} syncs done, not {steps} and 0."
            raise RuntimeError(message)
    return clock.step


def fits(args: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """The median step of each fit of each round, in seconds; every round begins with the next one."""
    kinds = [(count, kind) for count in TENSORS for kind in (WITH, EMPTY, WITHOUT)]
    for count, kind in kinds:
        step_time(count, kind, args)  # does not count
    found: dict[int, dict[str, list[float]]] = {count: {WITH: [], EMPTY: [], WITHOUT: []} for count in TENSORS}
    for turn in track(range(args.rounds), "rounds of fits"):
        first = turn % len(kinds)
        for count, kind in kinds[first:] + kinds[:first]:
            found[count][kind].append(step_time(count, kind, args))
    return found


def hooks(count: int, args: argparse.Namespace) -> list[float]:
    """Seconds that `SlowWeights` adds to ``optimizer.step()``, without a Trainer, in each round."""
    trained = parameters(count * [SHAPE], args.device)
    looked, plain = Still(trained), Still(trained)
    slow = SlowWeights(looked, NEVER)
    looked.step()  # the first step copies the weights
    times = take_turns({WITH: looked.step, WITHOUT: plain.step}, args.rounds)
    slow.close()
    return differences(times[WITH], times[WITHOUT])


def differences(more: list[float], less: list[float]) -> list[float]:
    """Round by round."""
    return [a - b for a, b in zip(more, less, strict=True)]


def waits(count: int, args: argparse.Namespace) -> str:
    """Whether an ordinary step's hooks wait for the device: ``none`` or ``found``, or why that is not known."""
    if args.device != "cuda":
        return "not measured: no CUDA device"
    try:
        fit(count, SMOKE_STEPS, args.device, Strict(NEVER))
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return "found"
    return "none"


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tensors: a step without the callback, and what the callback adds; in microseconds."""
    quietly()
    found = fits(args)
    above = {count: differences(times[WITH], times[EMPTY]) for count, times in found.items()}
    return [
        {
            "tensors": count,
            "step": _microseconds(found[count][WITHOUT]),
            "empty": _microseconds(differences(found[count][EMPTY], found[count][WITHOUT])),
            "above": _microseconds(above[count]),
            "hooks": _microseconds(hooks(count, args)),
            "waits": waits(count, args),
        }
        for count in TENSORS
    ]


def _microseconds(values: list[float]) -> dict[str, float]:
    return summary([1e6 * value for value in values])


def tables(report: Report) -> list[Table]:
    """What the callback adds to a step."""
    table = Table(
        f"Time added to a step between two syncs, microseconds; to reach: at most {MOST} more than an empty callback",
        [
            "trained tensors",
            "added by ours above an empty callback",
            "added by an empty callback",
            "step without a callback",
            "added by the hooks alone to optimizer.step()",
            "waits for the device",
        ],
    )
    for row in report["rows"]:
        cells = [text(row[name], "{:.1f}") for name in ("above", "empty", "step", "hooks")]
        table.rows.append([f"{row['tensors']:,}", *cells, row["waits"]])
    return [table]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=15).parse_args(), measure, tables)
