"""One fit with Lookahead: its outer loops, when they sync, and what swaps, saves and monitors them."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_lookahead._lightning import averages, log_now_and_then, real_optimizers, training_loss
from lightning_lookahead.evaluation.isolation import isolated
from lightning_lookahead.outer_loop.adaptive import AdaptiveAlpha, TrainingLoss
from lightning_lookahead.outer_loop.batch_norm import check_statistics

from .apart import Apart, trains_apart
from .checkpoint_hooks import CheckpointHooks
from .outer_loops import OuterLoops
from .rank_check import RankCheck
from .sync_log import figures
from .validation_swap import ValidationSwap

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer

    from lightning_lookahead.evaluation.monitor import InnerOuterMonitor
    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.settings import Settings
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights

SyncOptimizers = Literal["independently", "together"]
LogSyncs = bool | Literal["progress_bar"]


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
        log_syncs: Whether loggers get the number of syncs, and alpha if it changes; ``"progress_bar"``: it, too.
        log_distance: Whether loggers get the distance between theta and phi.
        check_ranks: Whether ranks compare their weights after each sync.

    Attributes:
        ended: The slow weights of optimizers whose cycle has ended in this batch.
        looks_always: Whether an option asks for something after each batch. If not, an ordinary step is over at once.
    """

    key: str
    settings: Settings
    saved: dict[str, Any]
    weights: Weights
    sync_optimizers: SyncOptimizers
    recalibrate: bool | int
    monitor: InnerOuterMonitor | None
    log_syncs: LogSyncs
    log_distance: bool
    check_ranks: bool

    def __post_init__(self) -> None:
        self.ended: list[SlowWeights] = []
        self.looks_always = False
        self._after_batch: list[Callable[..., None]] = []
        self._ranks = RankCheck()
        self._parts = False  # whether there are ranks that train apart
        self._trainer: Trainer | None = None  # while training is under way
        self.apart: Apart | None = None
        self.loops = OuterLoops()
        self.swap = ValidationSwap(self.loops, self.weights, self.recalibrate)
        self.checkpoints = CheckpointHooks(self.key, self.saved, self.loops, self.weights, self.swap, self.monitor)

    def prepare(self, trainer: Trainer, pl_module: LightningModule, *, share_gradients: bool) -> None:
        """Await a checkpoint; raise if ranks cannot train apart that should."""
        self._parts = not share_gradients and trains_apart(trainer)
        self.checkpoints.await_checkpoint(trainer.strategy, pl_module, parts=self._parts)

    def start(self, trainer: Trainer, pl_module: LightningModule, exclude: list[str]) -> None:
        """Make the slow weights; raise if an option does not work with these optimizers or this strategy."""
        optimizers = real_optimizers(trainer)
        if not optimizers:
            warnings.warn("configure_optimizers gave no optimizer: there is nothing to look ahead with.", stacklevel=2)
            return
        options: dict[str, Any] = {
            "module": trainer.strategy.model,
            "model_weights": self.weights,
            "measure_distance": self.log_distance,
        }
        if self._parts:
            together = self.sync_optimizers == "together"
            self.apart = Apart(trainer, optimizers, together=together, start_step=self.settings.start_step)
            self.swap.apart = self.checkpoints.apart = self.apart
            options |= {"workers": self.apart.workers, "share_buffers": self.apart.buffers.share}
        self.loops.add(optimizers, self.settings, exclude, pl_module, **options)
        alone = ("log_distance", self.log_distance), ("check_ranks", self.check_ranks)
        for name, value in (*alone, ("slow_device", self.settings.slow_device)):  # needs all weights on this rank
            if value and any(slow.parameters.sharded for slow in self.loops.slow_weights):
                message = f"{name}={value!r} does not work with a strategy that shards the weights: leave it out."
                raise ValueError(message)
        if self.recalibrate:
            check_statistics(pl_module, "recalibrate_batch_norm")
        by_hand = not pl_module.automatic_optimization
        if by_hand and self._needs_loss:
            message = (
                f"alpha={self.settings.alpha} needs the loss that training_step returns, and this module optimizes by"
                " hand: take AdaptiveAlpha('fisher'), a number or a schedule."
            )
            raise ValueError(message)
        for slow in self.loops.slow_weights:
            # By hand a batch may have several steps: a sync comes right after the one that ends the cycle.
            slow.inner_loop.when_due = functools.partial(self.sync_due if by_hand else self._note_ended, slow)
            slow.inner_loop.looks_in_closure = not by_hand
        if by_hand and self.monitor is not None:
            self.loops.slow_weights[0].inner_loop.after_each = self._observe
        self._after_batch = self._wanted(by_hand=by_hand)
        self.looks_always = self._after_batch not in ([], [self._sync_ended])
        self.checkpoints.serve(trainer.strategy)

    def _wanted(self, *, by_hand: bool) -> list[Callable[..., None]]:
        """What to do after a batch, in this order: each takes the arguments of ``on_train_batch_end``."""
        monitors = self.monitor is not None
        every: dict[Callable[..., None], bool] = {
            self._end_batch: self.apart is not None,
            self._note_loss: self._needs_loss,
            self._observe: monitors and not by_hand,
            self._sync_ended: not by_hand,
            self._compare_ranks: self.check_ranks,
            self._log: bool(self.log_syncs) or self.log_distance,
            self._note_modes: bool(self.recalibrate),
            self._publish: monitors,
        }
        return [each for each, wanted in every.items() if wanted]

    def begin(self, trainer: Trainer) -> None:
        """Begin or resume training."""
        self._trainer = trainer
        for slow in self.loops.slow_weights:
            slow.swap_to("fast")
            slow.persistence.begin()
        if self.apart is not None:
            self._part(self.apart)
            self.apart.compare_batches(trainer, self.loops)
            self.apart.watch(trainer.strategy, self.loops)
        if self.monitor is not None and self.loops.slow_weights:
            self.monitor.begin(trainer, self.loops.slow_weights[0])
        for slow in self.loops.slow_weights:  # a checkpoint may lie between the k-th step and its sync
            self.sync_due(slow)
        self._ranks.begin(self.loops.slow_weights)
        self.checkpoints.keep_loaded()

    def _part(self, apart: Apart) -> None:
        """Let the ranks part if the time has come, each with the buffers that it had when the checkpoint was saved."""
        own, self.checkpoints.own_buffers = self.checkpoints.own_buffers, {}
        apart.buffers.load(own)
        apart.part(self.loops)

    # -- after a batch

    def end_batch(self, *arguments: Any) -> None:
        """Do what is to do after a batch, with the arguments of ``on_train_batch_end``."""
        for each in self._after_batch:
            each(*arguments)

    def _end_batch(self, trainer: Trainer, *_: object) -> None:
        if self.apart is not None:
            self.apart.end_batch(trainer, self.loops)

    def _note_loss(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give adaptive alphas the loss of this batch."""
        for slow in self.loops.slow_weights:
            slow.alpha.loss = None
            if outputs and outputs.get("loss") is not None:  # training_step may have returned None
                loss = functools.partial(training_loss, trainer, pl_module, batch, batch_idx)
                slow.alpha.loss = TrainingLoss(loss, functools.partial(isolated, pl_module))

    @property
    def _needs_loss(self) -> bool:
        return isinstance(self.settings.alpha, AdaptiveAlpha) and self.settings.alpha.needs_loss

    def _observe(self, *_: object) -> None:
        if self.monitor is not None and self._trainer is not None:
            self.monitor.after_step(self._trainer, self.loops.slow_weights[0])

    def _note_ended(self, slow: SlowWeights) -> None:
        self.ended.append(slow)

    def _sync_ended(self, *_: object) -> None:
        while self.ended:
            self.sync_due(self.ended.pop())

    def _compare_ranks(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._ranks.look(trainer, pl_module, self.loops.slow_weights, "slow" if self.apart else "fast")

    def _log(self, trainer: Trainer, *_: object) -> None:
        values = functools.partial(figures, self.loops.slow_weights, syncs=bool(self.log_syncs))
        log_now_and_then(trainer, values, progress_bar=self.log_syncs == "progress_bar")

    def _note_modes(self, _: Trainer, pl_module: LightningModule, *__: object) -> None:
        self.swap.recalibration.note_modes(pl_module)

    def _publish(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if self.monitor is not None:
            self.monitor.publish(trainer, pl_module)

    def sync_due(self, slow: SlowWeights) -> None:
        """After a step of the optimizer of ``slow``: sync what is due."""
        due = self.loops.due(slow, together=self.sync_optimizers == "together")
        for each in due:
            each.sync()
        self._record(due)

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
            self._record([slow])

    def _record(self, synced: list[SlowWeights]) -> None:
        if self.monitor is None or self._trainer is None:
            return
        if any(slow is self.loops.slow_weights[0] for slow in synced):
            self.monitor.after_sync(self._trainer, self.loops.slow_weights[0])

    def end(self, trainer: Trainer, *, sync_unfinished: bool) -> None:
        """End training: sync once more or not, and leave one set in the module, or another callback's average."""
        self.checkpoints.keep_loaded()
        for slow in self.loops.counting if sync_unfinished else ():
            if slow.cycles.steps_since_sync:
                slow.sync(unfinished=True)
                self._record([slow])
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
        if self.apart is not None and self._trainer is not None:
            self.apart.stop(self._trainer.strategy)
        self._after_batch, self.looks_always, self._trainer = [], False, None
        self.ended.clear()
        self.loops.close()
