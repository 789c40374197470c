"""A metric and a mean loss of the weights that a module holds, over given batches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_lookahead._lightning import root_of, unlogged
from lightning_lookahead.outer_loop.sharding import entry, reshard

from .batches import stage
from .isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning.pytorch import Trainer


def classify(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The default step: a batch ``x, y`` gives ``module(x), y``."""
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:  # noqa: PLR2004
        message = (
            f"InnerOuterMonitor expects batches of two, (x, y), and got a {type(batch).__name__}: give it a function"
            " step=f with f(module, batch) -> (prediction, target)."
        )
        raise ValueError(message)
    inputs, target = batch
    try:
        return module(inputs), target
    except NotImplementedError as error:
        message = (
            f"InnerOuterMonitor evaluates module(x), and {type(module).__name__} has no forward: give it a function"
            " step=f with f(module, batch) -> (prediction, target)."
        )
        raise ValueError(message) from error


class Evaluation:
    """Measures a module in evaluation mode and leaves it as it was; all ranks take part, each with its own batches.

    Args:
        metric: Any torchmetrics metric that gives one number. ``None``: multiclass accuracy, and cross entropy as loss.
        step: ``step(module, batch)`` -> prediction and target, for the metric, and a mean loss if it gives three.
    """

    def __init__(self, metric: Metric | None, step: Callable[[nn.Module, Any], tuple[Any, ...]]) -> None:
        self._metric = metric.clone() if metric is not None else None
        self._classifies = metric is None
        self._step = step

    @property
    def name(self) -> str:
        """What the metric is called in log keys: ``acc`` for an accuracy, else its class name in snake case."""
        full = type(self._metric or MulticlassAccuracy).__name__
        bare = re.sub("^(Multiclass|Multilabel|Binary)(?=.)", "", full)
        words = re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", bare)
        return words.lower().replace("accuracy", "acc")

    @torch.no_grad()
    def measure(self, trainer: Trainer, batches: Iterable[Any]) -> tuple[float, float | None]:
        """The metric and the mean loss (``None`` if there is none) over the batches of all ranks."""
        module, root = trainer.lightning_module, root_of(trainer.strategy)
        losses = MeanMetric().to(trainer.strategy.root_device)
        counted = False
        if self._metric is not None:
            self._metric.to(trainer.strategy.root_device).reset()
        with (
            isolated(module),
            unlogged(module),
            stage(trainer, training=False),
            trainer.precision_plugin.val_step_context(),
        ):
            for part in module.modules():
                part.training = False  # not eval(), in which some modules do more than that
            _agree_on_buffers(root)
            for batch in batches:
                prediction, target, *loss = self._step(entry(module, root), batch)
                if self._metric is None:
                    self._metric = _accuracy(prediction, target).to(trainer.strategy.root_device)
                if self._classifies and not loss:
                    loss = [nn.functional.cross_entropy(prediction, target)]
                self._metric.update(prediction, target)
                for value in loss:
                    losses.update(value, len(target) if isinstance(target, Tensor) and target.ndim else 1)
                    counted = True
            assert self._metric is not None  # noqa: S101 (the monitor raises if there is no batch)
            value = self._metric.compute()
        reshard(root)  # the next forward has to see what an optimizer writes to the shards
        if not isinstance(value, Tensor) or value.numel() != 1:
            message = f"metric={self._metric} gives {value}: InnerOuterMonitor needs one that gives one number."
            raise ValueError(message)
        return float(value), float(losses.compute()) if counted else None


def _agree_on_buffers(root: nn.Module) -> None:
    """Give all ranks the buffers of the first, as DDP's own forward does; its wrapper is not entered here."""
    if isinstance(root, DistributedDataParallel) and root.broadcast_buffers:
        for buffer in root.buffers():
            broadcast(buffer, src=0)


def _accuracy(prediction: Any, target: Any) -> MulticlassAccuracy:
    fits = isinstance(prediction, Tensor) and isinstance(target, Tensor) and prediction.ndim > 1
    if not fits or target.is_floating_point() or prediction.shape[:1] + prediction.shape[2:] != target.shape:
        shapes = [tuple(getattr(value, "shape", [type(value).__name__])) for value in (prediction, target)]
        message = (
            "InnerOuterMonitor takes multiclass accuracy unless it is given a metric: for that it needs predictions of"
            f" shape (N, classes, ...) and integer targets of shape (N, ...), and got {shapes[0]} and {shapes[1]}. Give"
            " it metric= and, if need be, step=."
        )
        raise ValueError(message)
    return MulticlassAccuracy(prediction.shape[1], average="micro")
