"""One fit with Lookahead: its outer loops, when they sync, and what is saved and shown of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

from lightning_lookahead._lightning import training_loss
from lightning_lookahead.evaluation.isolation import isolated
from lightning_lookahead.outer_loop.adaptive import AdaptiveAlpha, TrainingLoss
from lightning_lookahead.trainer.checkpoint_hooks import CheckpointHooks
from lightning_lookahead.trainer.outer_loops import OuterLoops
from lightning_lookahead.trainer.validation_swap import ValidationSwap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_lookahead.evaluation.monitor import InnerOuterMonitor
    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.settings import Settings
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights

SyncOptimizers = Literal["independently", "together"]


class Fit:
    """What a callback has from the setup of a fit until the next one.

    Args:
        key: What the callback's state goes by in a checkpoint.
        settings: What each outer loop is told.
        told: What a checkpoint says of the run.
        weights: The set that validation sees and a checkpoint's ``state_dict`` holds.
        sync_optimizers: Whether several optimizers sync each for itself or together.
        recalibrate: From how many training batches BatchNorm's statistics are gathered before a validation.
        monitor: What evaluates after inner steps and syncs of the first optimizer.
    """

    def __init__(  # noqa: PLR0917 (the options of the callback that matter within a fit)
        self,
        key: str,
        settings: Settings,
        told: dict[str, Any],
        weights: Weights,
        sync_optimizers: SyncOptimizers,
        recalibrate: bool | int,  # noqa: FBT001
        monitor: InnerOuterMonitor | None,
    ) -> None:
        self._settings, self._monitor = settings, monitor
        self._together = sync_optimizers == "together"
        self._step_hooks: list[Any] = []  # on the optimizers, under manual optimization
        self.loops = OuterLoops()
        self.swap = ValidationSwap(self.loops, weights, recalibrate)
        self.checkpoints = CheckpointHooks(key, told, self.loops, weights, self.swap, monitor)

    def sync_in_steps(self, trainer: Trainer) -> None:
        """Sync right after the step that ends a cycle: under manual optimization a batch may have several."""
        if self._needs_loss:
            message = (
                f"alpha={self._settings.alpha} needs the loss that training_step returns, and this module optimizes by"
                " hand: take AdaptiveAlpha('fisher'), a number or a schedule."
            )
            raise ValueError(message)
        self._step_hooks = [
            slow.optimizer.register_step_post_hook(functools.partial(self.sync_due, trainer, slow))
            for slow in self.loops.slow_weights
        ]

    def begin(self, trainer: Trainer) -> None:
        """Begin training, or go on with it."""
        for slow in self.loops.slow_weights:
            slow.swap_to("fast")
            slow.begin()
        if self._monitor is not None and self.loops.slow_weights:
            self._monitor.begin(trainer, self.loops.slow_weights[0])
        for slow in self.loops.slow_weights:  # a checkpoint may be of between the k-th step and its on_train_batch_end
            self.sync_due(trainer, slow)
        self.checkpoints.keep_loaded()

    def note_loss(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say how the loss of this batch is computed again, if an alpha needs it."""
        for slow in self.loops.slow_weights if self._needs_loss else ():
            slow.alpha.loss = None
            if outputs and outputs.get("loss") is not None:  # training_step may have returned None
                loss = functools.partial(training_loss, trainer, pl_module, batch, batch_idx)
                slow.alpha.loss = TrainingLoss(loss, functools.partial(isolated, pl_module))

    @property
    def _needs_loss(self) -> bool:
        return isinstance(self._settings.alpha, AdaptiveAlpha) and self._settings.alpha.needs_loss

    def sync_due(self, trainer: Trainer, slow: SlowWeights, *_: object) -> None:
        """After a step of the optimizer of ``slow``: do Algorithm 1's outer step, if it is time."""
        if self._monitor is not None and slow is self.loops.slow_weights[0]:
            self._monitor.after_step(trainer, slow)
        due = self.loops.due(slow, together=self._together)
        for each in due:
            each.sync()
        self._record(trainer, due)

    def sync_now(self, trainer: Trainer) -> None:
        """Do the outer step of every optimizer."""
        for slow in self.loops.counting:
            slow.sync()
            self._record(trainer, [slow])

    def _record(self, trainer: Trainer, synced: list[SlowWeights]) -> None:
        if self._monitor is not None and any(slow is self.loops.slow_weights[0] for slow in synced):
            self._monitor.after_sync(trainer, self.loops.slow_weights[0])

    def end(self, trainer: Trainer, *, sync_unfinished: bool, leave: Weights | None) -> None:
        """End training; it may be said twice.

        Args:
            trainer: The Trainer.
            sync_unfinished: Whether to sync once more.
            leave: The set that the module holds then; ``None``: an average that another callback has put there.
        """
        self.checkpoints.keep_loaded()
        for slow in self.loops.counting if sync_unfinished else ():
            if slow.steps_since_sync:
                slow.sync(begun=True)
                self._record(trainer, [slow])
        if self._monitor is not None and self.loops.counting:
            self._monitor.end(trainer)
        if leave is not None:
            self.loops.swap_to(leave)
        self._stop()
        self.loops.follow()
        if leave is None or not self.loops.left:  # what others load when training has ended is not what we left
            self.loops.leave()

    def abort(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything where it belongs after an exception."""
        self.swap.end()
        self._stop()
        self.checkpoints.undo(trainer, pl_module)
        self.loops.leave()
        if self._monitor is not None:
            self._monitor.let_go()

    def _stop(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        self.loops.close()
