"""BatchNorm statistics for the weights that a validation sees: the module's own were gathered with fast weights."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from lightning_lookahead._lightning import root_of
from lightning_lookahead.outer_loop.batch_norm import check_statistics, statistics_of
from lightning_lookahead.outer_loop.sharding import entry, reshard
from lightning_lookahead.outer_loop.tensors import copies, copy_

from .batches import Given, check_repeatable, for_training, ready, stage
from .isolation import isolated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import Trainer
    from torch import Tensor

    from lightning_lookahead.outer_loop.saved_format import Weights


def check_recalibrate(value: object, eval_weights: Weights | None = None) -> None:
    """Raise unless ``value`` says which batches: a bool, a number of at least 0, or batches.

    Args:
        value: What was given.
        eval_weights: The set that is validated; ``None``: both.
    """
    if eval_weights == "fast" and value:  # the truth of a loader is its length, which not all have
        message = (
            f"recalibrate_batch_norm={value!r} does nothing with eval_weights='fast', which the statistics belong to:"
            " leave it out."
        )
        raise ValueError(message)
    if (isinstance(value, int) and value >= 0) or (hasattr(value, "__iter__") and not isinstance(value, str)):
        check_repeatable("recalibrate_batch_norm", value)
        return
    message = (
        f"recalibrate_batch_norm={value!r} is out of range: give True (all training batches), how many of them (0 for"
        " none), a loader or list of batches, or False."
    )
    raise ValueError(message)


class Recalibration:
    """Statistics gathered anew, which the module holds from `start` to `stop`.

    BatchNorm layers that do not train while the module does, frozen ones, keep their statistics.
    """

    def __init__(self) -> None:
        self.replaced: dict[Tensor, Tensor] = {}
        """Statistic -> its value before `start`, which `stop` restores."""
        self._modes: dict[nn.Module, bool] = {}

    def note_modes(self, module: nn.Module) -> None:
        """Remember which parts train: in validation none does."""
        self._modes = {part: part.training for part in module.modules()}

    def start(self, trainer: Trainer, which: Any) -> None:
        """Gather the statistics with the weights that the module holds, by torch's own `update_bn`."""
        module, root = trainer.lightning_module, root_of(trainer.strategy)
        check_statistics(module, "recalibrate_batch_norm")
        given = not isinstance(which, int)
        loaders = Given(which) if given else for_training(trainer)
        if which is True and trainer.num_training_batches == float("inf") and loaders.endless:
            message = (
                "recalibrate_batch_norm=True would gather statistics from all training batches, and they never end: say"
                " from how many, recalibrate_batch_norm=100."
            )
            raise ValueError(message)
        limits = [] if given else [trainer.num_training_batches, *([] if which is True else [which])]
        with (
            isolated(module, loaders.parts),
            stage(trainer, training=True),
            trainer.precision_plugin.train_step_context(),
        ):
            batches = ready(trainer, loaders, min(limits, default=None))
            first = next(batches, None)
            if first is None:
                message = "recalibrate_batch_norm found no training batch to gather statistics from."
                raise ValueError(message)
            gathering = _Gathering(entry(module, root), self._modes)
            momenta = {part: part.momentum for part in gathering.modules()}
            try:
                update_bn(chain([first], batches), gathering)
            finally:  # update_bn restores them only if nothing is raised
                for part, momentum in momenta.items():
                    part.momentum = momentum
            gathered = copies(statistics_of(module))
        reshard(root)
        statistics = statistics_of(module)
        self.replaced = dict(zip(statistics, copies(statistics), strict=True))
        copy_(statistics, gathered)

    def stop(self) -> None:
        """Restore the statistics of before `start`."""
        copy_(self.replaced, self.replaced.values())
        self.replaced = {}

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Let the module hold the statistics of before `start` inside the ``with`` block, for a checkpoint."""
        gathered = copies(self.replaced)
        copy_(self.replaced, self.replaced.values())
        try:
            yield
        finally:
            copy_(self.replaced, gathered)


class _Gathering(nn.Module):
    """The module as `update_bn` should see it: the BatchNorm layers that train, each part in the mode it trains in."""

    def __init__(self, root: nn.Module, modes: dict[nn.Module, bool]) -> None:
        super().__init__()
        self._call = root.__call__  # not a submodule
        some_train = any(modes.values())
        self._modes = {part: modes.get(part, True) or not some_train for part in root.modules()}

    def modules(self, *_: Any, **__: Any) -> Iterator[nn.Module]:
        return (part for part, trains in self._modes.items() if trains and isinstance(part, _BatchNorm))

    def train(self, mode: bool = True) -> _Gathering:  # noqa: FBT001, FBT002 (torch's)
        for part, trains in self._modes.items():
            part.training = mode and trains
        return self

    def forward(self, *inputs: Any) -> Any:
        return self._call(*inputs)
