"""Batches from a Trainer's own loaders, transferred as the Trainer does it, without moving its iterators on."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_lookahead._lightning import (
    CombinedLoader,
    combined_loader,
    parts_of,
    sized_len,
    transferred,
    validation_data,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lightning.pytorch import Trainer


class Loaders:
    """Loaders, single or combined, that can be iterated beside the Trainer.

    Args:
        iterables: One loader, or a collection of them as a Trainer takes it.
        mode: How `CombinedLoader` combines them.
        limits: Most batches of each loader; ``None``: all.
    """

    def __init__(self, iterables: Any, mode: Any = "sequential", limits: list[float] | None = None) -> None:
        self.parts: list[Any] = tree_leaves(iterables)
        self._iterables, self._mode, self._limits = iterables, mode, limits

    @property
    def endless(self) -> bool:
        """Whether a loader has no length: it may never end."""
        return any(sized_len(part) is None for part in self.parts)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Each batch and the index of its loader."""
        loader = CombinedLoader(tree_map(_another, self._iterables), self._mode)
        loader.limits = self._limits
        for batch, _, index in loader:
            yield batch, index


class Given(Loaders):
    """Batches that the user gave: a loader or a list of batches."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.parts = [batches]

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return ((batch, 0) for batch in _another(self.parts[0]))


@contextmanager
def stage(trainer: Trainer, *, training: bool) -> Iterator[None]:
    """Let the Trainer be training, or validating, inside the ``with`` block: transfer hooks may ask for it."""
    before = trainer.state.stage
    try:
        if training:
            trainer.training = True
        else:
            trainer.validating = True
        yield
    finally:
        trainer.state.stage = before


def held_out(trainer: Trainer) -> Loaders:
    """The batches that a fit under way validates on; empty if it validates on none."""
    loader = combined_loader(trainer.fit_loop.epoch_loop.val_loop)
    if loader is not None:
        return Loaders(*parts_of(loader), list(trainer.num_val_batches))
    # The loop has no loader yet if the first epochs are not validated. Setting it up would move the loop on.
    limit = trainer.limit_val_batches
    iterables = validation_data(trainer) if limit else None
    if iterables is None:
        return Loaders([])
    if isinstance(iterables, CombinedLoader):
        return Loaders(*parts_of(iterables))
    fractions = [
        int(len(part) * limit) if isinstance(limit, float) and limit < 1 else limit for part in tree_leaves(iterables)
    ]
    return Loaders(
        iterables,
        limits=[float("inf") if number == 1.0 and isinstance(limit, float) else number for number in fractions],
    )


def for_training(trainer: Trainer) -> Loaders:
    """The batches that a fit has trained on, or else those of the data module or the module."""
    loader = combined_loader(trainer.fit_loop)
    if loader is not None:
        return Loaders(*parts_of(loader))
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by a part of the Trainer
    if datamodule is not None:
        datamodule.setup("fit")
    source = datamodule or trainer.lightning_module
    try:
        iterables = source.train_dataloader()
    except Exception as error:
        message = (
            f"{type(source).__name__} gives no training data ({error}): give the batches themselves,"
            " recalibrate_batch_norm=loader."
        )
        raise ValueError(message) from error
    return Loaders(iterables, "max_size_cycle")


def ready(trainer: Trainer, loaders: Loaders, limit: float | None) -> Iterator[Any]:
    """The first ``limit`` batches, on the device and as the step methods get them."""
    stop = None if limit is None or limit == float("inf") else int(limit)
    for batch, index in islice(loaders, stop):
        yield transferred(trainer, batch, index)


def check_repeatable(argument: str, data: object) -> None:
    """Raise if data can be iterated once only."""
    if hasattr(data, "__next__"):
        message = f"{argument} is an iterator, which gives its batches once: give a loader or a list of batches."
        raise ValueError(message)


def _another(loader: Any) -> Any:
    """The loader, or a copy if its workers are persistent: iterating it twice would restart them for both."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    other = copy.copy(loader)
    other._iterator = None
    return other
