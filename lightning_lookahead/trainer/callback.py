"""`LookaheadCallback`: the Trainer's hooks call the outer loop. Wiring only: no arithmetic, no saving."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_lookahead._arguments import PullbackMomentum, check_bool, check_choice
from lightning_lookahead._lightning import Callback, check_trainer, join_packages, move_to_front
from lightning_lookahead.evaluation.recalibration import check_recalibrate
from lightning_lookahead.outer_loop.saved_format import check_weights
from lightning_lookahead.outer_loop.settings import Buffers, Nonfinite, Settings

from .apart import check_options
from .fit import Fit, LogSyncs, SyncOptimizers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_lookahead.evaluation.monitor import InnerOuterMonitor
    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.schedules import CycleLength, StepSize
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights

    from .outer_loops import OuterLoops

UnfinishedCycle = Literal["drop", "sync"]


class LookaheadCallback(Callback):
    """Lookahead around whatever optimizer the module configures: k steps forward, 1 step back.

    Each optimizer has its own count of inner steps. Under automatic optimization the weights are synced in
    ``on_train_batch_end``; under manual optimization, where one batch may hold several steps, right after the k-th.
    A run that is stopped and resumed, at any step, is the uninterrupted run bit for bit.

    Args:
        k: Inner steps from one sync to the next; at least 1. Or a schedule over syncs, `Linear`, say. A group of an
            optimizer with a ``"lookahead_k"`` of its own has cycles of its own.
        alpha: Slow weights step size, in (0, 1]; 1 leaves the inner optimizer as it is. Or a schedule, or an
            `AdaptiveAlpha`. A group may have a ``"lookahead_alpha"`` of its own. Above 1 with ``outer_momentum`` only.
        eval_weights: The weights that validation sees, that a checkpoint's ``state_dict`` holds and that the module
            holds after fit: ``"slow"`` (phi, what the algorithm returns) or ``"fast"`` (theta).
        pullback_momentum: What a sync does to the inner optimizer's state: ``"none"`` leaves it alone, ``"pullback"``
            moves its momentum as the weights, from where it was after the last sync, ``"reset"`` makes it a new one's.
        outer_momentum: mu of the outer step, in [0, 1): with 0.9, say, SNOO or DiLoCo's outer step. 0 is Lookahead.
        outer_nesterov: Whether the outer momentum is Nesterov's; without outer momentum it is not used.
        start_step: Inner steps before the first cycle begins; until then there is one set of weights.
        unfinished_cycle: What the end of training does to a cycle that has not ended: ``"drop"`` leaves phi as it was
            after the last sync (Algorithm 1), ``"sync"`` syncs once more.
        exclude: Parameters to leave alone, by patterns of their names (``"*.bias"``, ``"head.*"``).
        sync_optimizers: ``"independently"``: each optimizer syncs for itself. ``"together"``: all sync when each has
            taken its ``k`` steps (Lookahead-Minmax for GANs).
        nonfinite: What a sync does if a fast weight is NaN or infinite: ``"raise"``, ``"skip"`` this sync, or
            ``"restore"`` the weights of the last sync, with the state of a new inner optimizer. ``"ignore"`` does not
            look, as Algorithm 1: a sync is sooner by the time of one reading, and never waits for the device.
        slow_dtype: Floating-point type of the slow weights; by default the parameters', but at least float32.
        slow_device: Where the slow weights are kept, ``"cpu"``, say; by default beside the parameters.
        buffers: What a sync does to BatchNorm's running means and variances: ``"keep"`` leaves them alone, ``"sync"``
            moves them as the weights, when the first optimizer syncs.
        monitor: Evaluates held-out data after every inner step of a window, as in the paper's Figure 10.
        recalibrate_batch_norm: Before each validation, gather BatchNorm's statistics anew with the slow weights, from
            all training batches (``True``) or the first so many. After it they are what they were.
        share_gradients: Whether DDP's ranks share gradients in each step. ``False``: from ``start_step`` on they train
            apart, and a sync moves phi towards the mean of their fast weights (Local SGD, DiLoCo).
        log_syncs: Send ``lookahead/syncs`` to the Trainer's loggers every ``log_every_n_steps``, and
            ``lookahead/alpha`` if it changes. ``"progress_bar"`` shows them in the bar, too.
        log_distance: Send ``lookahead/distance`` there, how far theta and phi were apart just before the last sync
            (Euclidean).
        check_ranks: After each sync, compare the weights of all ranks (DDP), and their outer momentum, and raise if one
            has drifted. Off, a sync issues no collective unless ranks train apart.

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

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1 and section 3.
    """

    def __init__(  # noqa: PLR0917
        self,
        k: CycleLength = 5,
        alpha: StepSize = 0.5,
        eval_weights: Weights = "slow",
        pullback_momentum: PullbackMomentum = "none",
        outer_momentum: float = 0.0,
        outer_nesterov: bool = True,  # noqa: FBT001, FBT002
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
        share_gradients: bool = True,  # noqa: FBT001, FBT002
        log_syncs: LogSyncs = False,  # noqa: FBT002 (YAML and the command line name every argument)
        log_distance: bool = False,  # noqa: FBT001, FBT002
        check_ranks: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        join_packages(LookaheadCallback)
        super().__init__()
        self.settings = Settings.among(locals())
        check_weights(eval_weights, "eval_weights")
        check_choice("unfinished_cycle", unfinished_cycle, get_args(UnfinishedCycle))
        check_choice("sync_optimizers", sync_optimizers, get_args(SyncOptimizers))
        check_recalibrate(recalibrate_batch_norm, eval_weights)
        if log_syncs not in (True, False, "progress_bar"):
            message = f"log_syncs={log_syncs!r} is unknown: give True, False or 'progress_bar'."
            raise ValueError(message)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude or [])
        self.share_gradients = check_bool(share_gradients, "share_gradients")
        if not share_gradients:
            check_options(self.settings, eval_weights, self.exclude)
        self.eval_weights: Weights = eval_weights
        self.unfinished_cycle, self.sync_optimizers = unfinished_cycle, sync_optimizers
        self.monitor, self.recalibrate_batch_norm = monitor, recalibrate_batch_norm
        self.log_syncs, self.log_distance, self.check_ranks = log_syncs, log_distance, check_ranks
        self._in_trainer = False
        self._fit = self._new_fit()

    def _new_fit(self) -> Fit:
        saved = {
            **self.settings.saved(),
            "eval_weights": self.eval_weights,
            "exclude": self.exclude,
            "sync_optimizers": self.sync_optimizers,
        }
        if not self.share_gradients:
            saved["share_gradients"] = False
        return Fit(
            self.state_key,
            self.settings,
            saved,
            self.eval_weights,
            self.sync_optimizers,
            self.recalibrate_batch_norm,
            self.monitor,
            self.log_syncs,
            self.log_distance,
            self.check_ranks,
        )

    @property
    def slow_weights(self) -> list[SlowWeights]:
        """The slow weights of each optimizer, from the start of a fit until the next fit starts."""
        return self._fit.loops.slow_weights

    @property
    def loops(self) -> OuterLoops:
        """The outer loops of all optimizers."""
        return self._fit.loops

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._in_trainer = True
        self._fit.checkpoints.key = self.state_key
        check_trainer(trainer)
        if stage != "fit":
            return
        self._fit.close()
        self._fit = self._new_fit()
        self._fit.prepare(trainer, pl_module, share_gradients=self.share_gradients)
        if self.monitor is not None:
            self.monitor.reset()
        # Other callbacks read and replace weights in validation and at the end of training (pruning masks, averaging
        # replaces): they have to come after the swap.
        move_to_front(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.start(trainer, pl_module, self.exclude)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.begin(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit.apart is not None:
            self._fit.apart.compare_batches(trainer, self.loops)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit.apart is not None:
            self._fit.apart.end_epoch(trainer, self.loops)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._fit.checkpoints.begin_batch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for slow in self._fit.loops.slow_weights:  # training_step may have added or unfrozen parameters
            if slow.optimizer is optimizer and slow.pairs.has_new:
                slow.inner_loop.track_new()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._fit.checkpoints.in_batch = False
        if self._fit.ended or self._fit.looks_always:
            self._fit.end_batch(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.end(trainer, sync_unfinished=self.unfinished_cycle == "sync")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_end(trainer, pl_module)  # Lightning leaves on_train_end out if no batch was trained

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._fit.abort(trainer, pl_module)

    def sync_now(self) -> None:
        """Do the outer step of every optimizer now, wherever in its cycle it is; a new cycle begins.

        Raises:
            RuntimeError: Outside of a fit, or while the module holds the slow weights (in validation).
        """
        self._fit.sync_now()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.swap.start(trainer)  # the end is the strategy's: after the hooks of all callbacks and of the module

    @contextmanager
    def use_weights(self, weights: Weights) -> Iterator[None]:
        """Let the module hold the ``"slow"`` or ``"fast"`` weights inside the ``with`` block, in place.

        After it the module holds what it held before, also if an exception was raised inside. During a fit and after
        it, until the next one starts.

        Raises:
            ValueError: If ``weights`` is neither.
            RuntimeError: If this process has started no fit, or if other weights were loaded into the module since.
        """
        self.loops.check_sets(weights)
        with self.loops.use(weights):
            yield

    def state_dict(self) -> dict[str, Any]:
        return self._fit.checkpoints.state_dict()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._fit.checkpoints.on_save_checkpoint(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._fit.checkpoints.on_load_checkpoint(trainer, checkpoint)

    @property
    def state_key(self) -> str:
        # Where a Trainer is made, Lightning refuses two callbacks with one key, in words of its own.
        return type(self).__name__ if self._in_trainer else f"{type(self).__name__}, {id(self)}"

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone outside of a fit: libraries keep callbacks among hyperparameters. In a fit, all of it."""
        left_out = {"log", "log_dict"} if self.loops.counting else {"log", "log_dict", "_fit"}  # logs: the module's
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_fit" not in state:
            self._fit = self._new_fit()
