"""Batches from a Trainer's own loaders, made ready as the Trainer makes them, without moving on what it iterates."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_lookahead._lightning import datamodule_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lightning.pytorch import Trainer


@contextmanager
def stage(trainer: Trainer, *, training: bool) -> Iterator[None]:
    """Let the Trainer be training, or validating, inside the ``with`` block: transfer hooks augment by that."""
    before = trainer.state.stage
    try:
        if training:
            trainer.training = True
        else:
            trainer.validating = True
        yield
    finally:
        trainer.state.stage = before


def held_out_loaders(trainer: Trainer) -> list[Any]:
    """The validation loaders of a fit that is under way; empty if it has none or is told to use none."""
    if not trainer.num_val_batches:  # not loaded yet, where the first epochs are not validated
        with stage(trainer, training=False):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return tree_leaves(trainer.val_dataloaders) if trainer.num_val_batches else []


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that a fit has used, or else those that the data module or the module gives."""
    loaders = trainer.train_dataloader
    if loaders is None:
        datamodule = datamodule_of(trainer)
        if datamodule is not None:
            datamodule.setup("fit")
        source = datamodule or trainer.lightning_module
        try:
            loaders = source.train_dataloader()
        except Exception as error:
            message = (
                f"{type(source).__name__} gives no training data ({error}): give the batches themselves,"
                " recalibrate_batch_norm=loader."
            )
            raise ValueError(message) from error
    return tree_leaves(loaders)


def batches(trainer: Trainer, loaders: Iterable[Any], limits: Iterable[float | None]) -> Iterator[Any]:
    """Yield the first batches of each loader, on the device and as the step methods get them."""
    module = trainer.lightning_module
    for index, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
        stop = None if limit is None or limit == float("inf") else int(limit)
        for batch in islice(_another(loader), stop):
            # What Lightning's loops do. `_on_before_batch_transfer` alone knows whether the module or the data module
            # has that hook.
            converted = trainer.precision_plugin.convert_input(batch)
            converted = module._on_before_batch_transfer(converted, dataloader_idx=index)
            yield trainer.strategy.batch_to_device(converted, dataloader_idx=index)


def _another(loader: Any) -> Any:
    """The loader, or one like it if it keeps its workers: to iterate it twice would restart them for both."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    other = copy.copy(loader)
    other._iterator = None
    return other
