"""One fit with Lookahead: its outer loops, when they sync, and what swaps, saves and monitors them."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_lookahead._lightning import averages, real_optimizers, training_loss
from lightning_lookahead.evaluation.isolation import isolated
from lightning_lookahead.outer_loop.adaptive import AdaptiveAlpha, TrainingLoss
from lightning_lookahead.outer_loop.batch_norm import check_statistics

from .apart import Apart, trains_apart
from .checkpoint_hooks import CheckpointHooks
from .outer_loops import OuterLoops
from .validation_swap import ValidationSwap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_lookahead.evaluation.monitor import InnerOuterMonitor
    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.settings import Settings
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights

SyncOptimizers = Literal["independently", "together"]


@dataclass(eq=False)
class Fit:
    """What a callback has from the setup of a fit until the setup of the next.

    Args:
        key: The key of the callback's state in a checkpoint.
        settings: The options of each outer loop.
        saved: The settings that a checkpoint holds.
        weights: The set that validation sees and a checkpoint's ``state_dict`` holds.
        sync_optimizers: Whether each optimizer syncs for itself or all sync together.
        recalibrate: How many training batches BatchNorm's statistics are gathered from before a validation; ``True``:
            all; ``False``: none.
        monitor: Evaluates after inner steps and syncs of the first optimizer.
    """

    key: str
    settings: Settings
    saved: dict[str, Any]
    weights: Weights
    sync_optimizers: SyncOptimizers
    recalibrate: bool | int
    monitor: InnerOuterMonitor | None

    def __post_init__(self) -> None:
        self._parts = False  # whether there are ranks that train apart
        self._step_hooks: list[Any] = []  # on the optimizers, under manual optimization
        self._trainer: Trainer | None = None  # while training is under way
        self.apart: Apart | None = None
        self.loops = OuterLoops()
        self.swap = ValidationSwap(self.loops, self.weights, self.recalibrate)
        self.checkpoints = CheckpointHooks(self.key, self.saved, self.loops, self.weights, self.swap, self.monitor)

    def prepare(self, trainer: Trainer, pl_module: LightningModule, *, share_gradients: bool) -> None:
        """Await a checkpoint; raise if ranks cannot train apart that should."""
        self._parts = not share_gradients and trains_apart(trainer)
        self.checkpoints.await_checkpoint(trainer.strategy, pl_module, parts=self._parts)

    def start(
        self, trainer: Trainer, pl_module: LightningModule, exclude: list[str], *, log_distance: bool, check_ranks: bool
    ) -> None:
        """Make the slow weights; raise if an option does not work with these optimizers or this strategy."""
        optimizers = real_optimizers(trainer)
        if not optimizers:
            warnings.warn("configure_optimizers gave no optimizer: there is nothing to look ahead with.", stacklevel=2)
            return
        options: dict[str, Any] = {
            "module": trainer.strategy.model,
            "model_weights": self.weights,
            "measure_distance": log_distance,
        }
        if self._parts:
            together = self.sync_optimizers == "together"
            self.apart = Apart(trainer, optimizers, together=together, start_step=self.settings.start_step)
            self.swap.apart = self.checkpoints.apart = self.apart
            options |= {"workers": self.apart.workers, "share_buffers": self.apart.buffers.share}
        self.loops.add(optimizers, self.settings, exclude, pl_module, **options)
        alone = {"log_distance": log_distance, "check_ranks": check_ranks, "slow_device": self.settings.slow_device}
        for name, value in alone.items():  # each needs all of the weights on this rank
            if value and any(slow.parameters.sharded for slow in self.loops.slow_weights):
                message = f"{name}={value!r} does not work with a strategy that shards the weights: leave it out."
                raise ValueError(message)
        if self.recalibrate:
            check_statistics(pl_module, "recalibrate_batch_norm")
        if not pl_module.automatic_optimization:
            self._sync_in_steps(trainer)
        self.checkpoints.serve(trainer.strategy)

    def _sync_in_steps(self, trainer: Trainer) -> None:
        """Sync right after the step that ends a cycle: under manual optimization a batch may have several steps."""
        if self._needs_loss:
            message = (
                f"alpha={self.settings.alpha} needs the loss that training_step returns, and this module optimizes by"
                " hand: take AdaptiveAlpha('fisher'), a number or a schedule."
            )
            raise ValueError(message)
        self._step_hooks = [
            slow.optimizer.register_step_post_hook(functools.partial(self._after_step, trainer, slow))
            for slow in self.loops.slow_weights
        ]

    def _after_step(self, trainer: Trainer, slow: SlowWeights, *_: object) -> None:
        if not slow.inner_loop.attempting:  # it has not ended then
            self.sync_due(trainer, slow)

    def begin(self, trainer: Trainer) -> None:
        """Begin or resume training."""
        self._trainer = trainer
        for slow in self.loops.slow_weights:
            slow.swap_to("fast")
            slow.persistence.begin()
        if self.apart is not None:
            self._part(self.apart)
            self.apart.compare_batches(trainer, self.loops)
            by_hand = not trainer.lightning_module.automatic_optimization
            after_step = functools.partial(self.sync_due, trainer) if by_hand else None
            self.apart.watch(trainer.strategy, self.loops, after_step)
        if self.monitor is not None and self.loops.slow_weights:
            self.monitor.begin(trainer, self.loops.slow_weights[0])
        for slow in self.loops.slow_weights:  # a checkpoint may lie between the k-th step and its sync
            self.sync_due(trainer, slow)
        self.checkpoints.keep_loaded()

    def _part(self, apart: Apart) -> None:
        """Let the ranks part if the time has come, each with the buffers that it had when the checkpoint was saved."""
        own, self.checkpoints.own_buffers = self.checkpoints.own_buffers, {}
        apart.buffers.load(own)
        apart.part(self.loops)

    def note_loss(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give adaptive alphas the loss of this batch, if they need it."""
        for slow in self.loops.slow_weights if self._needs_loss else ():
            slow.alpha.loss = None
            if outputs and outputs.get("loss") is not None:  # training_step may have returned None
                loss = functools.partial(training_loss, trainer, pl_module, batch, batch_idx)
                slow.alpha.loss = TrainingLoss(loss, functools.partial(isolated, pl_module))

    @property
    def _needs_loss(self) -> bool:
        return isinstance(self.settings.alpha, AdaptiveAlpha) and self.settings.alpha.needs_loss

    def sync_due(self, trainer: Trainer, slow: SlowWeights) -> None:
        """After a step of the optimizer of ``slow``: sync what is due."""
        if self.monitor is not None and slow is self.loops.slow_weights[0]:
            self.monitor.after_step(trainer, slow)
        due = self.loops.due(slow, together=self.sync_optimizers == "together")
        for each in due:
            each.sync()
        self._record(trainer, due)

    def sync_now(self) -> None:
        """Do the outer step of every optimizer."""
        if not self.loops.counting:
            message = "sync_now() was called outside of a fit: there is nothing to sync."
            raise RuntimeError(message)
        if self.apart is not None:
            try:
                self.apart.workers.await_all()
            except RuntimeError as error:
                message = (
                    f"sync_now() was called on rank {self.apart.workers.rank}, and not on all ranks within a minute:"
                    " with share_gradients=False all ranks have to call it together."
                )
                raise RuntimeError(message) from error
        for slow in self.loops.counting:
            slow.sync()
            self._record(self._trainer, [slow])

    def _record(self, trainer: Trainer | None, synced: list[SlowWeights]) -> None:
        if (
            trainer is not None
            and self.monitor is not None
            and any(slow is self.loops.slow_weights[0] for slow in synced)
        ):
            self.monitor.after_sync(trainer, self.loops.slow_weights[0])

    def end(self, trainer: Trainer, *, sync_unfinished: bool) -> None:
        """End training: sync once more or not, and leave one set in the module, or another callback's average."""
        self.checkpoints.keep_loaded()
        for slow in self.loops.counting if sync_unfinished else ():
            if slow.cycles.steps_since_sync:
                slow.sync(unfinished=True)
                self._record(trainer, [slow])
        if self.monitor is not None and self.loops.counting:
            self.monitor.end(trainer)
        averaged = averages(trainer)
        if not averaged:
            self.loops.swap_to(self.weights)
        if self.apart is not None:
            self._part(self.apart)  # `begin` was left out if there was nothing to train
            if self.apart.active:
                self.apart.buffers.hold_firsts()
        self._stop()
        self.loops.move_to_parameters()
        # `on_fit_end` calls this again: what others loaded since `on_train_end` is not what the fit left.
        if averaged or not self.loops.left:
            self.loops.leave()

    def close(self) -> None:
        """Let go of everything: another fit begins."""
        self.loops.close()
        if self.apart is not None:
            self.apart.close()

    def abort(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an exception, swap back, let go, and undo the loading of a refused checkpoint."""
        self.swap.end()
        self._stop()
        self.checkpoints.undo(trainer, pl_module)
        self.loops.leave()
        if self.monitor is not None:
            self.monitor.let_go()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}

    def _stop(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        if self.apart is not None and self._trainer is not None:
            self.apart.stop(self._trainer.strategy)
        self._step_hooks, self._trainer = [], None
        self.loops.close()
