"""Private names of Lightning's Trainer and loops, and Lightning's two packages.

``lightning.pytorch`` and ``pytorch_lightning`` are two packages with the same classes. The one that the user has
imported is used, and the other is not imported: it would take over the first one's log messages. Classes are told by
name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed
from torch.utils.data import IterableDataset

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    from lightning.fabric.utilities.data import sized_len
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
    from lightning.pytorch.utilities.seed import isolate_rng
else:
    from lightning_fabric.utilities.data import sized_len
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.utilities.combined_loader import CombinedLoader
    from pytorch_lightning.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor, nn

__all__ = ["Callback", "CombinedLoader", "DummyLogger", "isolate_rng", "sized_len"]  # the names of either package

TUNERS = {"BatchSizeFinder", "LearningRateFinder"}
AVERAGERS = {"StochasticWeightAveraging", "WeightAveraging"}
"""Callbacks that leave an average of their own in the module when training ends."""

_UNSUPPORTED_STRATEGIES = {
    "DeepSpeedStrategy": "the engine keeps its weights out of the optimizer's reach",
    "XLAStrategy": "XLA devices are not supported yet",
    "XLAFSDPStrategy": "XLA devices are not supported yet",
    "DDPXLAStrategy": "XLA devices are not supported yet",
    "SingleDeviceXLAStrategy": "XLA devices are not supported yet",
}


def join_packages(callback_class: type[Callback]) -> None:
    """Let a callback class inherit from each imported package's Callback: a Trainer takes only its own package's."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        package = sys.modules.get(name)
        if package is not None and not issubclass(callback_class, package.Callback):
            callback_class.__bases__ = (*callback_class.__bases__, package.Callback)


def has_class_named(instance: object, names: Iterable[str]) -> bool:
    """Whether the class of ``instance`` or one of its bases has one of these names."""
    return not {base.__name__ for base in type(instance).__mro__}.isdisjoint(names)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, in the order in which they are called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by one of the Trainer's connectors
    return callbacks


def move_to_front(trainer: Trainer, callback: Callback) -> None:
    """Let a callback come before all others but the tuners, which Lightning puts first."""
    others = [other for other in callbacks_of(trainer) if other is not callback]
    ahead = sum(has_class_named(other, TUNERS) for other in others)
    trainer.callbacks = [*others[:ahead], callback, *others[ahead:]]  # type: ignore[attr-defined]


def real_optimizers(trainer: Trainer) -> list[Any]:
    """The optimizers that ``configure_optimizers`` gave, without Lightning's stand-in for none."""
    return [own for own in trainer.optimizers if not has_class_named(own, ["_MockOptimizer"])]


def averages(trainer: Trainer) -> bool:
    """Whether a callback leaves an average of its own in the module when training ends."""
    return any(has_class_named(callback, AVERAGERS) for callback in callbacks_of(trainer))


@contextmanager
def unlogged(pl_module: LightningModule) -> Iterator[None]:
    """Let what the module logs inside the ``with`` block go nowhere."""
    pl_module.log = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pl_module.log


def training_loss(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """The loss of ``training_step`` for a batch, computed again; nothing is logged."""
    with unlogged(pl_module), trainer.precision_plugin.train_step_context():
        takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
        output = pl_module.training_step(*([batch, batch_idx] if takes_index else [batch]))
    return cast("Tensor", output["loss"] if isinstance(output, Mapping) else output)


def root_of(strategy: Strategy) -> nn.Module:
    """The module as the strategy has wrapped it, from the start of a run on."""
    return cast("nn.Module", strategy.model)


def check_trainer(trainer: Trainer) -> None:
    """Raise if the Trainer has a strategy that is not supported or more than one LookaheadCallback."""
    if sum(has_class_named(callback, ["LookaheadCallback"]) for callback in callbacks_of(trainer)) > 1:
        message = "callbacks has a second LookaheadCallback, which would pull back twice: keep one of them."
        raise ValueError(message)
    for name, reason in _UNSUPPORTED_STRATEGIES.items():
        if has_class_named(trainer.strategy, [name]):
            message = (
                f"LookaheadCallback does not work with strategy={type(trainer.strategy).__name__}: {reason}. Use one"
                " device, 'ddp', 'fsdp' or ModelParallelStrategy."
            )
            raise ValueError(message)


def combined_loader(loop: Any) -> CombinedLoader | None:
    """The loader that a loop of the Trainer iterates; ``None`` before it is made. No public name has its mode."""
    return cast("CombinedLoader | None", loop._combined_loader)


def parts_of(loader: CombinedLoader) -> tuple[Any, Any]:
    """The loaders in a combined one, and the mode that combines them."""
    return loader.iterables, loader._mode


def validation_data(trainer: Trainer) -> Any:
    """The data that a fit will validate on, ``None`` for nothing. Setting up the loop would move it on."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() else None


def transferred(trainer: Trainer, batch: Any, index: int) -> Any:
    """A batch of the loader of this index, as Lightning's loops hand it to the step methods."""
    converted = trainer.precision_plugin.convert_input(batch)
    # The private method knows whether the module or the data module has the hook.
    converted = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=index)
    return trainer.strategy.batch_to_device(converted, dataloader_idx=index)


def has_run_a_batch(trainer: Trainer) -> bool:
    """Whether a batch was begun in any loop."""
    fit = trainer.fit_loop.epoch_loop
    loops = fit, fit.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop
    return any(loop.batch_progress.total.ready for loop in loops)


def has_certain_length(trainer: Trainer) -> bool:
    """Whether it is known how many batches the training loaders have: a stream's length may be wrong."""
    loader = combined_loader(trainer.fit_loop)
    if loader is None or sized_len(loader) is None:
        return False
    return not any(isinstance(getattr(one, "dataset", None), IterableDataset) for one in loader.flattened)


@contextmanager
def joining_batch(trainer: Trainer) -> Iterator[None]:
    """Take part in what Lightning begins each batch with, a broadcast of whether a signal to end has come.

    A rank that has another batch waits in it for those that have none, which are inside the ``with`` block.
    """
    ends = torch.tensor([0], device=trainer.strategy.root_device)
    joined = distributed.broadcast(ends, src=0, async_op=True)
    yield
    joined.wait()


def steps_by_itself(pl_module: LightningModule) -> bool:
    """Whether the module's own code says when an optimizer steps."""
    own = type(pl_module).optimizer_step
    return not pl_module.automatic_optimization or not own.__module__.startswith(("lightning.", "pytorch_lightning."))


def writes_folders(strategy: Strategy) -> bool:
    """Whether a strategy writes a checkpoint as a folder, each rank its own shards."""
    by_shards = getattr(strategy, "_save_distributed_checkpoint", False)  # ModelParallelStrategy
    return bool(by_shards) or getattr(strategy, "_state_dict_type", None) == "sharded"  # FSDPStrategy


def log_now_and_then(trainer: Trainer, values: Callable[[], dict[str, float]], *, progress_bar: bool = False) -> None:
    """Send values to the Trainer's loggers every ``log_every_n_steps``, as its `LearningRateMonitor` does.

    Args:
        trainer: The Trainer.
        values: Computes the values: it is called when they are sent.
        progress_bar: Whether the progress bar gets them, too.
    """
    if not (trainer.loggers or progress_bar) or not trainer._logger_connector.should_update_logs:
        return
    found = values()
    if progress_bar:
        trainer._logger_connector._progress_bar_metrics.update(found)
    for logger in trainer.loggers:
        logger.log_metrics(found, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
