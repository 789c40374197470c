"""Ranks of a DDP run that train apart from one sync to the next: no gradient leaves a rank."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import SyncBatchNorm

from lightning_lookahead._lightning import (
    AVERAGERS,
    callbacks_of,
    has_certain_length,
    has_class_named,
    joining_batch,
    root_of,
    steps_by_itself,
)
from lightning_lookahead.outer_loop.adaptive import AdaptiveAlpha
from lightning_lookahead.outer_loop.shared_buffers import SharedBuffers
from lightning_lookahead.outer_loop.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from lightning_lookahead.outer_loop.settings import Settings

    from .outer_loops import OuterLoops

_SENDING = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer", "DistributedShampoo")
"""Optimizers whose step exchanges something between ranks."""


def check_options(settings: Settings, eval_weights: str, exclude: Sequence[str]) -> None:
    """Raise if an option does not work where ranks train apart."""
    if eval_weights == "fast":
        _refuse(
            "eval_weights='fast'",
            "each rank has fast weights of its own, and a checkpoint's 'state_dict' holds one set for all. Give 'slow'",
        )
    if isinstance(settings.alpha, AdaptiveAlpha):
        _refuse(
            f"alpha={settings.alpha}",
            "it estimates the best point between phi and theta, and each rank has a theta of its own. Give a number or"
            " a schedule",
        )
    if exclude:
        _refuse(
            f"exclude={exclude!r}",
            "a parameter without a slow weight would differ between ranks for ever. Leave it out, or freeze those"
            " parameters",
        )


def trains_apart(trainer: Trainer) -> bool:
    """Whether there are ranks to train apart; warns if there is one process, raises if the strategy is not DDP."""
    if trainer.world_size == 1:
        message = "share_gradients=False changes nothing: there is one process, which shares with nobody."
        warnings.warn(message, stacklevel=2)
        return False
    if not has_class_named(trainer.strategy, ["DDPStrategy"]):
        _refuse(
            f"strategy={type(trainer.strategy).__name__}",
            "only DDP's gradients can be kept on a rank. Take 'ddp'. Workers of several ranks, with weights sharded"
            " within each, are not supported yet",
        )
    return True


class Apart:
    """Keeps gradients on their ranks from ``start_step`` on, and lets the ranks meet.

    Args:
        trainer: The Trainer, whose strategy has wrapped the module by DDP.
        optimizers: The optimizers.
        together: Whether all optimizers sync together.
        start_step: Inner steps in which gradients are shared, as DDP does.

    Attributes:
        workers: The ranks.
        buffers: What buffers they share.

    Raises:
        ValueError: If something in the run would exchange gradients or weights by itself.
    """

    def __init__(self, trainer: Trainer, optimizers: Sequence[Optimizer], *, together: bool, start_step: int) -> None:
        strategy: Any = trainer.strategy
        self._ddp = cast("Any", root_of(strategy))
        self._start_step = start_step
        self._check(strategy, optimizers, together=together)
        for callback in callbacks_of(trainer):
            if has_class_named(callback, AVERAGERS):
                _refuse(type(callback).__name__, "each rank would average fast weights of its own. Leave it out")
        self.workers = Workers(self._ddp.process_group, strategy._timeout)
        self._sends: bool = self._ddp.broadcast_buffers
        self.buffers = SharedBuffers(self._ddp, self.workers, sends=self._sends)
        self._compares = False  # whether one rank could come further than another between two syncs
        self._gradients = _Gradients(self._ddp.process_group)
        self._ddp.register_comm_hook(self._gradients, share_or_keep)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ddp": None}  # it belongs to this process

    @property
    def active(self) -> bool:
        """Whether the ranks train apart now."""
        return self._gradients.stay

    def _check(self, strategy: Any, optimizers: Sequence[Optimizer], *, together: bool) -> None:
        if distributed.get_world_size(self._ddp.process_group) < distributed.get_world_size():
            _refuse("process_group", "DDP has only some of the ranks. Leave it out")
        if any(isinstance(part, SyncBatchNorm) for part in self._ddp.modules()):
            _refuse(
                "SyncBatchNorm",
                "it exchanges statistics in each forward. Leave sync_batchnorm=True out: a sync averages BatchNorm's"
                " statistics",
            )
        if self._ddp.find_unused_parameters:
            _refuse(
                "find_unused_parameters=True",
                "DDP then exchanges in each step which parameters were used. Leave it out, and freeze unused ones",
            )
        if strategy._ddp_comm_hook or strategy._ddp_comm_state or self._ddp._comm_hooks:
            _refuse(
                "A communication hook",
                "DDP has one, which keeps the gradients here. Leave ddp_comm_hook and ddp_comm_state out",
            )
        for optimizer in optimizers:
            if has_class_named(optimizer, _SENDING):
                _refuse(
                    f"optimizer {type(optimizer).__name__}",
                    "its step exchanges weights or gradients. Give the optimizer inside it",
                )
        if len(optimizers) > 1 and not together:
            _refuse(
                "sync_optimizers='independently'",
                f"ranks could sync the {len(optimizers)} optimizers in different orders, and would wait for each other"
                " for ever. Give 'together'",
            )

    def watch(self, strategy: Strategy, loops: OuterLoops) -> None:
        """Count every attempt at a step.

        Args:
            strategy: The strategy. Lightning's optimizers step through it, also if a scaler then skips the step.
            loops: The outer loops.
        """
        strategy.optimizer_step = functools.partial(  # type: ignore[method-assign]
            self._optimizer_step, strategy, loops
        )

    def part(self, loops: OuterLoops) -> None:
        """Train apart from now on if all optimizers have taken their first steps together."""
        self._gradients.stay = all(slow.steps >= self._start_step for slow in loops.slow_weights)
        self._ddp.broadcast_buffers = self._sends and not self.active

    def _optimizer_step(
        self, strategy: Strategy, loops: OuterLoops, optimizer: Optimizer, *args: Any, **named: Any
    ) -> Any:
        """What ``strategy.optimizer_step()`` returns, counted on every rank alike."""
        slow = next((own for own in loops.slow_weights if own.optimizer is optimizer), None)
        if slow is None:  # the strategy's optimizers were replaced
            return type(strategy).optimizer_step(strategy, optimizer, *args, **named)
        with slow.inner_loop.attempt():
            output = type(strategy).optimizer_step(strategy, optimizer, *args, **named)
        self.part(loops)
        return output

    def compare_batches(self, trainer: Trainer, loops: OuterLoops) -> None:
        """Raise, on every rank, if the ranks have different numbers of batches; where an epoch or a run begins."""
        batches = trainer.num_training_batches
        number = -1 if batches == float("inf") else int(batches)
        self.workers.agree("at the start of an epoch", steps=_steps(loops), batches=number)
        self._compares = self.workers.any(steps_by_itself(trainer.lightning_module) or not has_certain_length(trainer))

    def end_batch(self, trainer: Trainer, loops: OuterLoops) -> None:
        """Raise, on every rank, if one has come further than another or has no more batches.

        Only where steps are not Lightning's own or nobody knows how many batches there are.
        """
        self.part(loops)
        if self._compares:
            self.workers.agree("at the end of a batch", steps=_steps(loops), batches=int(not trainer.is_last_batch))

    def end_epoch(self, trainer: Trainer, loops: OuterLoops) -> None:
        """Raise, on every rank, if one has not come to the end of the epoch."""
        with joining_batch(trainer):  # in which others may be
            self.workers.agree("at the end of an epoch", steps=_steps(loops))

    def stop(self, strategy: Strategy) -> None:
        """Let go of the strategy."""
        vars(strategy).pop("optimizer_step", None)

    def close(self) -> None:
        """Let go of what ranks meet through: another fit begins."""
        if self.workers.numbers is not None and distributed.is_initialized():  # a copy has none
            distributed.destroy_process_group(self.workers.numbers)


@dataclass
class _Gradients:
    """What DDP's hook goes by. It refers to nothing else: DDP's reducer, which Python cannot see into, keeps it.

    Attributes:
        group: The process group.
        stay: Whether gradients stay on their ranks.
    """

    group: ProcessGroup | None
    stay: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {"group": None, "stay": self.stay}


def share_or_keep(gradients, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 (DDP reads annotations)
    """Hand a bucket of gradients back as it is, or average it over all ranks, as DDP does."""
    return noop_hook(None, bucket) if gradients.stay else allreduce_hook(gradients.group, bucket)


def _steps(loops: OuterLoops) -> int:
    return sum(slow.steps for slow in loops.slow_weights)


def _refuse(what: str, why: str) -> None:
    message = f"{what} does not work with share_gradients=False: {why}."
    raise ValueError(message)
