"""BatchNorm statistics of the weights that are looked at: those at hand were gathered with fast weights."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torch.optim.swa_utils import update_bn

from lightning_lookahead._batches import batches, stage, training_loaders
from lightning_lookahead._buffers import check_statistics, statistics_of
from lightning_lookahead._lightning import root_of
from lightning_lookahead._sharding import entry, reshard
from lightning_lookahead._tensors import copies, copy_
from lightning_lookahead._undisturbed import undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Trainer
    from torch import Tensor


def check_recalibrate(value: object) -> None:
    """Raise unless ``value`` says which batches: a bool, a number of at least 0, or batches."""
    if (isinstance(value, int) and value >= 0) or (hasattr(value, "__iter__") and not isinstance(value, str)):
        return
    message = (
        f"recalibrate_batch_norm={value!r} is out of range: give True (all training batches), how many of them (at"
        " least 1), or False."
    )
    raise ValueError(message)


class Recalibration:
    """Statistics gathered anew, in place from `start` to `stop`; between them it keeps those that were there."""

    def __init__(self) -> None:
        self.kept: dict[Tensor, Tensor] = {}
        """Each statistic and the value that it will have again."""

    def start(self, trainer: Trainer, which: Any) -> None:
        """Gather the statistics with the weights that the module holds, by torch's own `update_bn`."""
        module, root = trainer.lightning_module, root_of(trainer.strategy)
        check_statistics(module, "recalibrate_batch_norm")
        statistics = statistics_of(module)
        given = not isinstance(which, int)
        loaders = [which] if given else training_loaders(trainer)
        limit = None if given or which is True else which
        with undisturbed(module, loaders), stage(trainer, training=True), trainer.precision_plugin.train_step_context():
            ready = islice(batches(trainer, loaders, [limit] * len(loaders)), limit)
            first = next(ready, None)
            if first is None:
                message = "recalibrate_batch_norm found no training batch to gather statistics from."
                raise ValueError(message)
            update_bn(chain([first], ready), entry(module, root))
            gathered = copies(statistics)
        reshard(root)
        self.kept = dict(zip(statistics, copies(statistics), strict=True))
        copy_(statistics, gathered)

    def stop(self) -> None:
        """Put back what was there."""
        copy_(self.kept, self.kept.values())
        self.kept = {}

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Let what was there be there inside the ``with`` block, for a checkpoint."""
        gathered = copies(self.kept)
        copy_(self.kept, self.kept.values())
        try:
            yield
        finally:
            copy_(self.kept, gathered)
