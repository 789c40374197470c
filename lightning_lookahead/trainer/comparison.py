"""`compare_weights`: slow against fast weights, measured on the same data."""

from __future__ import annotations

import functools
import io
import json
import math
import sys
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from lightning_lookahead._lightning import AVERAGERS, Callback, DummyLogger, callbacks_of, has_class_named, root_of
from lightning_lookahead.checkpointing import read_checkpoint, weights_in
from lightning_lookahead.evaluation.batches import check_repeatable
from lightning_lookahead.evaluation.isolation import isolated
from lightning_lookahead.evaluation.recalibration import Recalibration, check_recalibrate

from .callback import LookaheadCallback
from .module_state import kept_weights, load_whole
from .outer_loops import OTHERS_LOADED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy

    from lightning_lookahead.outer_loop.saved_format import Weights


@dataclass(frozen=True)
class Comparison:
    """What validation logged with each set of weights. ``print()`` shows it as a table.

    Attributes:
        slow: Metric name -> its value with the slow weights (phi).
        fast: Metric name -> its value with the fast weights (theta).
    """

    slow: dict[str, float]
    fast: dict[str, float]

    @property
    def difference(self) -> dict[str, float]:
        """Slow minus fast, of the metrics that both have."""
        return {name: value - self.fast[name] for name, value in self.slow.items() if name in self.fast}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """``slow``, ``fast`` and ``difference``, each metric name -> float."""
        return {**asdict(self), "difference": self.difference}

    def to_json(self) -> str:
        """`to_dict` as JSON; NaN and infinities, which JSON lacks, are ``null``."""
        finite = {
            part: {name: value if math.isfinite(value) else None for name, value in values.items()}
            for part, values in self.to_dict().items()
        }
        return json.dumps(finite, indent=2)

    def __str__(self) -> str:
        names = list(dict.fromkeys([*self.slow, *self.fast]))
        rows = [
            [
                name,
                *(_number(part, name, sign) for part, sign in zip(self.to_dict().values(), ("", "", "+"), strict=True)),
            ]
            for name in names
        ]
        return _table([["metric", "slow", "fast", "slow - fast"], *rows])


def compare_weights(
    trainer: Trainer,
    model: LightningModule,
    dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | Path | None = None,
    *,
    recalibrate_batch_norm: bool | int | Iterable[Any] = False,
    weights_only: bool | None = None,
) -> Comparison:
    """Validate the same data twice, with the slow and with the fast weights, and say what came out.

    Works after ``trainer.fit(model)`` with the `LookaheadCallback` that trained, and on a checkpoint with any Trainer.
    Both validations start from the same state of the random number generators. After it the weights, modes, buffers,
    metrics and random number generators are what they were. Nothing is sent to the Trainer's loggers.

    Args:
        trainer: The Trainer that validates. Its own ``validate`` is called.
        model: The module.
        dataloaders: As in ``trainer.validate``; by default the module's own.
        datamodule: As in ``trainer.validate``.
        ckpt_path: A checkpoint that holds both sets of weights: a path, or what else ``trainer.validate`` takes
            (``"best"``). ``None``: the sets of the fit.
        recalibrate_batch_norm: Gather BatchNorm's statistics anew for each set of weights: from all training batches
            (``True``), from so many of them, or from these batches; the module is called with a batch, or with its
            first part if it is a list or tuple. The module's own statistics were gathered with fast weights. Layers
            that are in evaluation mode while others train keep their statistics.
        weights_only: As in ``trainer.validate``, how the checkpoint is read.

    Raises:
        ValueError: If there is one set of weights only, if ``model`` is not the one that was trained, if validation
            logs nothing, if ``recalibrate_batch_norm`` is out of range, or under `FSDPStrategy`.
        RuntimeError: If the Trainer is in the middle of a run.

    Example::

        trainer.fit(model)
        print(compare_weights(trainer, model))
    """
    check_recalibrate(recalibrate_batch_norm)
    if trainer.state.status == "running":
        message = "compare_weights was called inside a run of this Trainer: call it when that has ended."
        raise RuntimeError(message)
    if has_class_named(trainer.strategy, ["FSDPStrategy"]):
        message = (
            "compare_weights does not work with FSDPStrategy, which cannot validate a module twice: give a checkpoint"
            " of the run, ckpt_path=, to a Trainer with one device, DDP or ModelParallelStrategy."
        )
        raise ValueError(message)
    module = getattr(model, "_orig_mod", model)  # torch.compile(model)
    callback = None if ckpt_path else _trained(trainer, module)
    check_repeatable("dataloaders", dataloaders)
    recalibration = Recalibration()
    recalibration.note_modes(module)
    found: dict[str, dict[str, float]] = {}
    for weights in ("slow", "fast"):
        with ExitStack() as stack:
            stack.enter_context(isolated(module, [*tree_leaves(dataloaders), datamodule]))
            stack.enter_context(_unlogged(trainer))
            recalibrating = not isinstance(recalibrate_batch_norm, int) or recalibrate_batch_norm > 0
            own: list[Callback] = [_Recalibrating(recalibration, recalibrate_batch_norm)] if recalibrating else []
            if callback is None:
                stack.enter_context(_loading(trainer, module, weights))
            else:
                own.insert(0, _Using(callback, weights, stack))
            stack.enter_context(_with_callbacks(trainer, own))
            logged = trainer.validate(
                model, dataloaders, ckpt_path, verbose=False, datamodule=datamodule, weights_only=weights_only
            )
            found[weights] = {name: float(value) for part in logged for name, value in part.items()}
    if not found["slow"] and not found["fast"]:
        message = "There is nothing to compare: validation logged no metric. Does the module log any, on any data?"
        raise ValueError(message)
    return Comparison(**found)


def _trained(trainer: Trainer, module: LightningModule) -> LookaheadCallback:
    """The callback that has both sets of this module's weights."""
    for callback in callbacks_of(trainer):
        if has_class_named(callback, AVERAGERS):
            message = (
                f"{type(callback).__name__} has put its average in the place of the fast weights when training ended:"
                " give a checkpoint of the run, ckpt_path=."
            )
            raise ValueError(message)
    for callback in callbacks_of(trainer):
        if isinstance(callback, LookaheadCallback) and callback.slow_weights:
            if not any(slow.parameters.sharded or slow.values("slow") for slow in callback.slow_weights):
                message = "There is one set of weights only: that fit has trained no parameter."
                raise ValueError(message)
            own = set(module.parameters())
            if any(
                slow.parameters.sharded or not own.isdisjoint(slow.values("slow")) for slow in callback.slow_weights
            ):
                if callback.loops.others_loaded:
                    message = f"There is one set of weights only: {OTHERS_LOADED}"
                    raise ValueError(message)
                return callback
            message = (
                "model is not the module that this Trainer's LookaheadCallback has trained: give it, or ckpt_path=."
            )
            raise ValueError(message)
    message = (
        "There is one set of weights only: this Trainer has not trained with a LookaheadCallback in this process. Give"
        " a checkpoint of a run that had one, ckpt_path=."
    )
    raise ValueError(message)


@contextmanager
def _loading(trainer: Trainer, module: LightningModule, weights: Weights) -> Iterator[None]:
    """Let the Trainer find ``weights`` in the checkpoint that it loads."""
    strategy = trainer.strategy
    replaced = vars(strategy).get("load_checkpoint")
    optimizers, strategy.optimizers = strategy.optimizers, []  # sharded strategies would load them, too
    strategy.load_checkpoint = functools.partial(_load, strategy, weights)  # type: ignore[method-assign]
    try:
        with kept_weights(module), warnings.catch_warnings():
            # The checkpoint is read for its weights alone.
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
            yield
    finally:
        strategy.optimizers = optimizers
        del strategy.load_checkpoint
        if replaced is not None:
            strategy.load_checkpoint = replaced  # type: ignore[method-assign]


def _load(strategy: Strategy, weights: Weights, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What ``strategy.load_checkpoint()`` returns, with ``weights`` in it or, where it loads by itself, loaded."""
    weights_only = kwargs.get("weights_only") is not False
    sharded = strategy.restore_checkpoint_after_setup
    try:
        folder = Path(path).is_dir() and not sharded
        checkpoint = None if folder else type(strategy).load_checkpoint(strategy, path, *args, **kwargs)
    except Exception:
        if Path(path).exists():
            read_checkpoint(path, weights_only=weights_only)  # raises a better error if the file is damaged
        raise
    if sharded or checkpoint is None:
        path = strategy.broadcast(path)
        whole = read_checkpoint(path, weights_only=weights_only)
        if checkpoint is not None:
            load_whole(root_of(strategy), weights_in(whole, weights, path))
            return checkpoint
        checkpoint = whole
    return {**checkpoint, "state_dict": weights_in(checkpoint, weights, path)}


@contextmanager
def _unlogged(trainer: Trainer) -> Iterator[None]:
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def _with_callbacks(trainer: Trainer, own: list[Callback]) -> Iterator[None]:
    """Add callbacks, and leave out averaging ones: they validate with their average, which is neither set."""
    callbacks = callbacks_of(trainer)
    before = list(callbacks)
    callbacks[:] = [*(callback for callback in before if not has_class_named(callback, AVERAGERS)), *own]
    try:
        yield
    finally:
        callbacks[:] = before


class _Using(Callback):
    """Lets the module hold a set of weights from the start of a validation until the stack ends.

    Not before: where ranks have fast weights of their own, DDP would give all of them the first one's.
    """

    def __init__(self, callback: LookaheadCallback, weights: Weights, stack: ExitStack) -> None:
        self.callback, self.weights, self.stack = callback, weights, stack

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stack.enter_context(self.callback.use_weights(self.weights))


class _Recalibrating(Callback):
    """Gathers BatchNorm statistics before a validation; `isolated` restores the module's own after it."""

    def __init__(self, recalibration: Recalibration, which: Any) -> None:
        self.recalibration, self.which = recalibration, which

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recalibration.start(trainer, self.which)


def _number(values: dict[str, float], name: str, sign: str) -> str:
    return f"{values[name]:{sign}.6g}" if name in values else ""


def _table(rows: list[list[str]]) -> str:
    """A table as text, numbers to the right; `rich` draws it where it is installed."""
    heading, *body = rows
    try:
        from rich.console import Console  # noqa: PLC0415 (optional)
        from rich.table import Table  # noqa: PLC0415
    except ImportError:
        widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)
    table = Table(heading[0])
    for name in heading[1:]:
        table.add_column(name, justify="right")
    for row in body:
        table.add_row(*row)
    # rich draws lines only if stdout's encoding has them.
    text = io.TextIOWrapper(io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8", newline="\n")
    Console(file=text, width=200).print(table)
    text.seek(0)
    return text.read().rstrip()
