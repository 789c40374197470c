"""`LookaheadCallback`: the Trainer's hooks call the outer loop. Wiring only, no arithmetic on weights."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

from typing_extensions import override

from lightning_lookahead._batch_norm import check_recalibrate
from lightning_lookahead._inner_optimizer import check_optimizer
from lightning_lookahead._lightning import (
    AVERAGERS,
    TUNERS,
    callbacks_of,
    check_sharded_options,
    check_trainer,
    is_a,
    join_packages,
    log_to_loggers,
    matching,
    owned_by_others,
    training_loss,
)
from lightning_lookahead._names import names_in
from lightning_lookahead._numbers import check_choice
from lightning_lookahead._ranks import check_ranks
from lightning_lookahead._saved_format import check_weights
from lightning_lookahead._saving import SavingCallback
from lightning_lookahead._settings import Buffers, Nonfinite, PullbackMomentum, Settings
from lightning_lookahead._statistics import check_statistics
from lightning_lookahead._undisturbed import undisturbed
from lightning_lookahead.adaptive import AdaptiveAlpha, TrainingLoss
from lightning_lookahead.slow_weights import SlowWeights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_lookahead._saved_format import Weights
    from lightning_lookahead.monitor import InnerOuterMonitor
    from lightning_lookahead.step_size import Length, StepSize

UnfinishedCycle = Literal["drop", "sync"]
SyncOptimizers = Literal["independently", "together"]


class LookaheadCallback(SavingCallback):
    """Lookahead around whatever optimizer the module configures: k steps forward, 1 step back.

    Each optimizer has its own count of inner steps. Under automatic optimization the weights are synced in
    ``on_train_batch_end``; under manual optimization, where one batch may hold several steps, right after the k-th.
    A run that is stopped and resumed, at any step, is the uninterrupted run bit for bit.

    Args:
        k: Inner steps from one sync to the next; at least 1. Or a schedule over syncs, `Linear`, say.
            An optimizer's group with a ``"lookahead_k"`` of its own has cycles of its own.
        alpha: Slow weights step size, in (0, 1]; 1 leaves the inner optimizer as it is. Or a schedule, and a group's
            own ``"lookahead_alpha"``, as for ``k``; or an `AdaptiveAlpha`.
        eval_weights: The weights that validation sees, that a checkpoint's ``state_dict`` holds and that the module
            holds after fit: ``"slow"`` (phi, what the algorithm returns) or ``"fast"`` (theta).
        pullback_momentum: What a sync does to the inner optimizer's state: ``"none"`` leaves it alone, ``"reset"``
            makes it that of a new optimizer, ``"pullback"`` lets its momentum go the way of the weights, with alpha
            from where it was after the last sync.
        start_step: Inner steps before the first cycle begins; until then there is one set of weights.
        unfinished_cycle: What the end of training does to a cycle that has not ended: ``"drop"`` leaves phi as it was
            after the last sync (Algorithm 1), ``"sync"`` syncs once more.
        exclude: Parameters to leave alone, by patterns of their names (``"*.bias"``, ``"head.*"``).
        sync_optimizers: ``"independently"``: each optimizer counts and syncs for itself. ``"together"``: all sync when
            each has taken its ``k`` steps (Lookahead-Minmax for GANs).
        nonfinite: What a sync does if a fast weight is infinite or no number: ``"raise"``, ``"skip"`` this sync, or
            ``"restore"`` the weights of the last sync, with the inner optimizer's state that of a new one.
        slow_dtype: Floating-point type of the slow weights; by default the parameters', but at least float32, so that
            they keep progress that is too small for a parameter in bfloat16.
        buffers: What a sync does to BatchNorm's running means and variances: ``"keep"`` leaves them alone, ``"sync"``
            moves them as it does weights. With several optimizers it does so when the first one syncs.
        slow_device: Where the slow weights are kept: ``"cpu"`` leaves the GPU's memory free; by default beside the
            parameters.
        monitor: Evaluates held-out data after every inner step of a window, as in the paper's Figure 10.
        recalibrate_batch_norm: Before each validation, gather BatchNorm's statistics anew with the slow weights, from
            all training batches (``True``) or the first so many: those at hand were gathered with fast weights. After
            it they are what they were; checkpoints hold those.
        log_syncs: Send ``lookahead/syncs``, the syncs done, to the Trainer's loggers every ``log_every_n_steps``, and
            ``lookahead/alpha``, the last sync's, if it changes.
        log_distance: Send ``lookahead/distance`` there, how far theta and phi were apart just before the last sync
            (Euclidean).
        check_ranks: After each sync, compare the weights of all ranks (DDP) and raise if one has drifted: one checksum
            of the weights and one small collective for each sync. Off, a sync issues no collective.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(
        ...     callbacks=[LookaheadCallback(k=5, alpha=0.5)], max_steps=10, logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        ... )
        >>> trainer.fit(BoringModel())
        >>> trainer.callbacks[0].slow_weights
        [SlowWeights(SGD, k=5, alpha=0.5, syncs=2)]

        A last cycle of two steps dropped and synced, of all parameters and of the bias; and two optimizers, of which
        the second takes two steps in each batch, each by itself and together:

        >>> def train(model, **options):  # syncs and parameters of each optimizer
        ...     callback = LookaheadCallback(k=5, **options)
        ...     trainer = Trainer(
        ...         callbacks=[callback], limit_train_batches=7, max_epochs=1, logger=False, accelerator="cpu",
        ...         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     )
        ...     trainer.fit(model)
        ...     return [(slow.syncs, len(slow.values("slow"))) for slow in callback.slow_weights]
        >>> train(BoringModel()), train(BoringModel(), unfinished_cycle="sync", exclude="*.weight")
        ([(1, 2)], [(2, 1)])
        >>> class Two(BoringModel):
        ...     automatic_optimization = False
        ...     def training_step(self, batch, batch_idx):
        ...         first, second = self.optimizers()
        ...         for optimizer in (first, second, second):
        ...             optimizer.zero_grad()
        ...             self.manual_backward(self(batch).sum())
        ...             optimizer.step()
        ...     def configure_optimizers(self):
        ...         return [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]
        >>> train(Two()), train(Two(), sync_optimizers="together")
        ([(1, 1), (2, 1)], [(1, 1), (1, 1)])

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1 and section 3.
    """

    def __init__(  # noqa: PLR0917
        self,
        k: Length = 5,
        alpha: StepSize = 0.5,
        eval_weights: Weights = "slow",
        pullback_momentum: PullbackMomentum = "none",
        start_step: int = 0,
        unfinished_cycle: UnfinishedCycle = "drop",
        exclude: str | list[str] | None = None,
        sync_optimizers: SyncOptimizers = "independently",
        nonfinite: Nonfinite = "raise",
        slow_dtype: str | None = None,
        slow_device: str | None = None,
        buffers: Buffers = "keep",
        monitor: InnerOuterMonitor | None = None,
        recalibrate_batch_norm: bool | int = False,  # noqa: FBT001, FBT002
        log_syncs: bool = False,  # noqa: FBT001, FBT002 (YAML and the command line name every argument)
        log_distance: bool = False,  # noqa: FBT001, FBT002
        check_ranks: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        join_packages(LookaheadCallback)
        super().__init__()
        check_weights(eval_weights, "eval_weights")
        check_choice("unfinished_cycle", unfinished_cycle, get_args(UnfinishedCycle))
        check_choice("sync_optimizers", sync_optimizers, get_args(SyncOptimizers))
        self.settings = Settings(k, alpha, start_step, pullback_momentum, nonfinite, slow_dtype, slow_device, buffers)
        self.unfinished_cycle = unfinished_cycle
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude or [])
        self.sync_optimizers = sync_optimizers
        self.eval_weights: Weights = eval_weights
        check_recalibrate(recalibrate_batch_norm)
        if recalibrate_batch_norm and eval_weights == "fast":
            message = (
                f"recalibrate_batch_norm={recalibrate_batch_norm!r} does nothing with eval_weights='fast', which the"
                " statistics belong to: leave it out."
            )
            raise ValueError(message)
        self.monitor = monitor
        self.recalibrate_batch_norm = recalibrate_batch_norm
        self.log_syncs = log_syncs
        self.log_distance = log_distance
        self.check_ranks = check_ranks
        self._step_hooks: list[Any] = []  # on the optimizers, under manual optimization
        self._checked: list[int] = []  # syncs after which ranks were compared, for each optimizer
        self._trainer: Trainer | None = None  # during a fit
        self._in_trainer = False

    # -- one fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._in_trainer = True
        check_trainer(trainer)
        if stage != "fit":
            return
        self._await_checkpoint(trainer, pl_module)
        if self.monitor is not None:
            self.monitor.reset()
        # First, so that every other callback finds the weights that validation and the end of training are about:
        # pruning masks them, averaging replaces them. Only the tuners stay ahead, as Lightning sorts them.
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        ahead = sum(is_a(callback, TUNERS) for callback in others)
        trainer.callbacks = [*others[:ahead], self, *others[ahead:]]  # type: ignore[attr-defined]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizers = [optimizer for optimizer in trainer.optimizers if not is_a(optimizer, ["_MockOptimizer"])]
        if not optimizers:
            warnings.warn("configure_optimizers gave no optimizer: there is nothing to look ahead with.", stacklevel=2)
            return
        for optimizer in optimizers:
            check_optimizer(optimizer)
        excluded = matching(self.exclude, pl_module)
        elsewhere = owned_by_others(optimizers, pl_module)
        for index, optimizer in enumerate(optimizers):  # one by one: if one is refused, the others are let go of
            slow = SlowWeights(
                optimizer,
                **{**vars(self.settings), **({} if index == 0 else {"buffers": "keep"})},
                sync_in_step=False,
                exclude=[*excluded, *elsewhere[index]],
                shared=[parameter for other in elsewhere for parameter in other],
                module=trainer.strategy.model,
                model_weights=self.eval_weights,
                measure_distance=self.log_distance,
            )
            self.slow_weights.append(slow)
        if any(slow.sharded for slow in self.slow_weights):
            check_sharded_options(
                log_distance=self.log_distance, check_ranks=self.check_ranks, slow_device=self.settings.slow_device
            )
        if self.recalibrate_batch_norm:
            check_statistics(pl_module, "recalibrate_batch_norm")
        if self._needs_loss and not pl_module.automatic_optimization:
            message = (
                f"alpha={self.settings.alpha} needs the loss that training_step returns, and this module optimizes by"
                " hand: take AdaptiveAlpha('fisher'), a number or a schedule."
            )
            raise ValueError(message)
        if not pl_module.automatic_optimization:
            self._step_hooks = [
                slow.optimizer.register_step_post_hook(functools.partial(self._after_step, trainer, slow))
                for slow in self.slow_weights
            ]
        self._serve_checkpoints(trainer.strategy)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        for slow in self.slow_weights:
            slow.swap_to("fast")
            slow.begin()
        if self.monitor is not None and self.slow_weights:
            self.monitor.begin(trainer, self.slow_weights[0])
        for slow in self.slow_weights:  # the checkpoint was saved after the k-th step and before its on_train_batch_end
            self._after_step(trainer, slow)
        self._checked = [slow.syncs for slow in self.slow_weights]
        self._before_loading = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end_showing()
        self._in_batch = True

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for slow in self._counting():  # a step that began before training_step may find parameters unfrozen there
            if slow.optimizer is optimizer:
                slow.inner_loop.track_new()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False
        for index, slow in enumerate(self.slow_weights):
            slow.alpha.loss = None
            if self._needs_loss and outputs and outputs.get("loss") is not None:  # training_step may have returned None
                loss = functools.partial(training_loss, trainer, pl_module, batch, batch_idx)
                slow.alpha.loss = TrainingLoss(loss, functools.partial(undisturbed, pl_module))
            self._after_step(trainer, slow)
            if self.check_ranks and slow.syncs != self._checked[index] and trainer.world_size > 1:
                self._checked[index] = slow.syncs
                names = names_in(pl_module)
                check_ranks({names.get(p, ["(of another module)"])[0]: p for p in slow.values("fast")})
        if self.log_syncs or self.log_distance:
            log_to_loggers(trainer, self._figures())
        if self.recalibrate_batch_norm:
            self._recalibration.note_modes(pl_module)
        if self.monitor is not None and self.slow_weights:
            self.monitor.publish(trainer, pl_module)

    def _after_step(self, trainer: Trainer, slow: SlowWeights, *_: object) -> None:
        monitor = self.monitor if slow is self.slow_weights[0] else None
        if monitor is not None:
            monitor.after_step(trainer, slow)
        if not slow.due:
            return
        together = self.slow_weights if self.sync_optimizers == "together" else [slow]
        if all(other.due for other in together):
            for other in together:
                other.sync()
            if self.monitor is not None and any(other is self.slow_weights[0] for other in together):
                self.monitor.after_sync(trainer, self.slow_weights[0])

    @property
    def _needs_loss(self) -> bool:
        return isinstance(self.settings.alpha, AdaptiveAlpha) and self.settings.alpha.needs_loss

    def sync_now(self) -> None:
        """Do the outer step of every optimizer now, wherever in its cycle it is; a new cycle begins.

        Raises:
            RuntimeError: Outside of a fit, or while the module holds the slow weights (in validation).
        """
        if not self._counting():
            message = "sync_now() was called outside of a fit: there is nothing to sync."
            raise RuntimeError(message)
        for slow in self._counting():
            slow.sync()
            self._record_sync(slow)

    def _record_sync(self, slow: SlowWeights) -> None:
        if self.monitor is not None and slow is self.slow_weights[0] and self._trainer is not None:
            self.monitor.after_sync(self._trainer, slow)

    def _figures(self) -> dict[str, float]:
        """What is logged if it is asked for."""
        figures: dict[str, float] = {}
        for index, slow in enumerate(self.slow_weights):
            suffix = f"/{index}" if len(self.slow_weights) > 1 else ""
            if self.log_syncs:
                figures[f"lookahead/syncs{suffix}"] = float(slow.syncs)
                if slow.last_alpha is not None and _varies(slow):
                    figures[f"lookahead/alpha{suffix}"] = slow.last_alpha
            if slow.last_distance is not None:
                figures[f"lookahead/distance{suffix}"] = float(slow.last_distance)
        return figures

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)  # on_train_end is left out where no batch was trained

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._recalibration.stop()
        self._in_batch, self._shown = False, []
        for slow in self._counting():
            slow.swap_to("fast")
        self._stop_counting()
        if self._before_loading and trainer.state.fn == "fit":
            pl_module.load_state_dict(self._before_loading)
        self._before_loading = {}
        self._left = [slow.fingerprint() for slow in self.slow_weights]
        if self.monitor is not None:
            self.monitor.let_go()

    def _finish(self, trainer: Trainer) -> None:
        self._before_loading = {}
        if self.unfinished_cycle == "sync":
            for slow in self._counting():
                if slow.steps_since_sync:
                    slow.sync(begun=True)
                    self._record_sync(slow)
        if self.monitor is not None and self._counting():
            self.monitor.end(trainer)
        for slow in self._counting():
            if not any(is_a(callback, AVERAGERS) for callback in callbacks_of(trainer)):
                slow.swap_to(self.eval_weights)
        self._stop_counting()
        for slow in self.slow_weights:
            slow.swap_to(slow.active)  # after on_train_end Lightning has moved the module to the CPU: follow it
        averages = any(is_a(callback, AVERAGERS) for callback in callbacks_of(trainer))
        if not self._left or averages:  # what others load into the module when training has ended is not what we left
            self._left = [slow.fingerprint() for slow in self.slow_weights]

    def _stop_counting(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        self._trainer = None
        for slow in self.slow_weights:
            slow.close()

    def _counting(self) -> list[SlowWeights]:
        """Those of a fit that is under way: none before it, after it or after an exception in it."""
        return [slow for slow in self.slow_weights if slow.counting]

    # -- either set of weights

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for slow in self._counting():
            slow.swap_to(self.eval_weights)
        if self.recalibrate_batch_norm and self._counting() and not trainer.sanity_checking:
            self._recalibration.start(trainer, self.recalibrate_batch_norm)

    @override
    def _after_validation(self) -> None:
        """After every other callback's ``on_validation_end`` and the module's: first in, last out."""
        self._recalibration.stop()
        for slow in self._counting():
            slow.swap_to("fast")

    # -- what a copy has

    @property
    @override
    def state_key(self) -> str:
        # Where a Trainer is made, Lightning refuses two callbacks with one key, in words of its own.
        return type(self).__name__ if self._in_trainer else f"{type(self).__name__}, {id(self)}"

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone outside of a fit: libraries keep callbacks among hyperparameters. In a fit, all of it."""
        if self._counting():
            return {**self.__dict__, "_trainer": None}
        kept = {name: value for name, value in self.__dict__.items() if name not in {"log", "log_dict"}}  # the module's
        return {**kept, **self._nothing_trained(), "_trainer": None}

    def _settings(self) -> dict[str, Any]:
        return {
            **self.settings.saved(),
            "eval_weights": self.eval_weights,
            "exclude": self.exclude,
            "sync_optimizers": self.sync_optimizers,
        }


def _varies(slow: SlowWeights) -> bool:
    """Whether alpha is not one number for all syncs."""
    return not isinstance(slow.settings.alpha, (int, float)) or len(slow.cycles) > 1
