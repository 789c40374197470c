"""`LookaheadCallback`: the Trainer's hooks call the outer loop. Wiring only, no arithmetic on weights."""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import override

from lightning_lookahead._batch_norm import Recalibration, check_recalibrate, check_statistics
from lightning_lookahead._carried import Weights, carried_in
from lightning_lookahead._checks import (
    VERSION,
    check_alpha,
    check_k,
    check_optimizer,
    check_saved,
    check_sharded_options,
    check_weights,
    warn_of_differences,
)
from lightning_lookahead._lightning import (
    AVERAGERS,
    TUNERS,
    Callback,
    callbacks_of,
    check_disjoint,
    check_trainer,
    is_a,
    join_packages,
    names_of,
)
from lightning_lookahead._module_state import detach_aliases, state_dict_of_slow
from lightning_lookahead._ranks import check_ranks
from lightning_lookahead._tensors import copies
from lightning_lookahead._tracked import parameters_of
from lightning_lookahead.slow_weights import SlowWeights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor

    from lightning_lookahead.monitor import InnerOuterMonitor


class LookaheadCallback(Callback):
    """Lookahead around whatever optimizer the module configures: k steps forward, 1 step back.

    Each optimizer has its own count of inner steps. Under automatic optimization the weights are synced in
    ``on_train_batch_end``; under manual optimization, where one batch may hold several steps, right after the k-th.
    A run that is stopped and resumed, at any step, is the uninterrupted run bit for bit.

    Args:
        k: Inner steps from one sync to the next; at least 1.
        alpha: Slow weights step size, in (0, 1]; 1 leaves the inner optimizer as it is.
        eval_weights: The weights that validation sees, that a checkpoint's ``state_dict`` holds and that the module
            holds after fit: ``"slow"`` (phi, what the algorithm returns) or ``"fast"`` (theta).
        pullback_momentum: What a sync does to the inner optimizer's momentum: ``"none"`` leaves it alone.
        monitor: Evaluates held-out data after every inner step of a window, as in the paper's Figure 10.
        recalibrate_batch_norm: Before each validation, gather BatchNorm's statistics anew with the slow weights, from
            all training batches (``True``) or the first so many: those at hand were gathered with fast weights. After
            it they are what they were; checkpoints hold those.
        log_syncs: Log ``lookahead/syncs``, the syncs done so far, to the progress bar and loggers.
        log_distance: Log ``lookahead/distance``, how far theta and phi were apart just before a sync (Euclidean).
        check_ranks: After each sync, compare the weights of all ranks (DDP) and raise if one has drifted: one checksum
            of the weights and one small collective for each sync. Off, a sync issues no collective.

    Raises:
        ValueError: If an argument is out of range.

    Example:
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
        k: int = 5,
        alpha: float = 0.5,
        eval_weights: Weights = "slow",
        pullback_momentum: Literal["none"] = "none",
        monitor: InnerOuterMonitor | None = None,
        recalibrate_batch_norm: bool | int = False,  # noqa: FBT001, FBT002
        log_syncs: bool = True,  # noqa: FBT001, FBT002 (YAML and the command line name every argument)
        log_distance: bool = False,  # noqa: FBT001, FBT002
        check_ranks: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        join_packages(LookaheadCallback)
        super().__init__()
        check_weights(eval_weights, "eval_weights")
        if pullback_momentum != "none":
            message = f"pullback_momentum={pullback_momentum!r} is unknown: give 'none'."
            raise ValueError(message)
        self.k = check_k(k)
        self.alpha = check_alpha(alpha)
        self.eval_weights: Weights = eval_weights
        self.pullback_momentum = pullback_momentum
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
        self.slow_weights: list[SlowWeights] = []
        """One for each optimizer, from the start of a fit until the next fit starts."""
        self._recalibration = Recalibration()
        self._step_hooks: list[Any] = []  # on the optimizers, under manual optimization
        self._tied: list[list[str]] = []  # names that share a parameter, before a strategy wrapped the module
        self._logged: list[int] = []  # syncs that were logged, for each optimizer
        self._restored: list[dict[str, Any]] = []  # counters from a checkpoint, until there are optimizers to count for
        self._before_loading: dict[str, Tensor] = {}  # the module's state, while a checkpoint is loaded over it
        self._foreign = False  # the checkpoint was made without us

    # -- one fit

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer)
        for slow in self.slow_weights:
            slow.close()
        self.slow_weights, self._restored, self._foreign, self._before_loading = [], [], False, {}
        if self.monitor is not None:
            self.monitor.reset()
        self._tied = [names for names in names_of(pl_module).values() if len(names) > 1]
        strategy = trainer.strategy
        strategy.load_checkpoint = functools.partial(self._load_checkpoint, strategy)  # type: ignore[method-assign]
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
        check_disjoint(optimizers, pl_module)
        self.slow_weights = [
            SlowWeights(
                optimizer,
                self.k,
                self.alpha,
                sync_in_step=False,
                module=trainer.strategy.model,
                model_weights=self.eval_weights,
                measure_distance=self.log_distance,
            )
            for optimizer in optimizers
        ]
        if any(slow.sharded for slow in self.slow_weights):
            check_sharded_options(log_distance=self.log_distance, check_ranks=self.check_ranks)
        if self.recalibrate_batch_norm:
            check_statistics(pl_module)
        if not pl_module.automatic_optimization:
            self._step_hooks = [
                slow.optimizer.register_step_post_hook(functools.partial(self._after_step, trainer, slow))
                for slow in self.slow_weights
            ]
        self._load_counters()
        if self.eval_weights == "slow":
            # Lightning asks the strategy, once, for the weights of every checkpoint; with save_weights_only=True no
            # hook of a callback is called. A partial, unlike a closure, leaves the strategy picklable.
            strategy = trainer.strategy
            strategy.lightning_module_state_dict = functools.partial(  # type: ignore[method-assign]
                self._slow_state_dict, strategy
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for slow in self.slow_weights:
            slow.put("fast")
        if self.monitor is not None and self.slow_weights:
            self.monitor.begin(trainer, self.slow_weights[0])
        for slow in self.slow_weights:  # the checkpoint was saved after the k-th step and before its on_train_batch_end
            self._after_step(trainer, slow)
        self._logged = [slow.syncs for slow in self.slow_weights]
        self._before_loading = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for index, slow in enumerate(self.slow_weights):
            self._after_step(trainer, slow)
            if slow.syncs != self._logged[index]:
                self._logged[index] = slow.syncs
                if self.check_ranks and trainer.world_size > 1:
                    names = names_of(pl_module)
                    check_ranks({names.get(p, ["(of another module)"])[0]: p for p in slow.values("fast")})
                self._log(trainer, pl_module, slow, f"/{index}" if len(self.slow_weights) > 1 else "")

        if self.monitor is not None and self.slow_weights:
            self.monitor.publish(trainer, pl_module)

    def _after_step(self, trainer: Trainer, slow: SlowWeights, *_: object) -> None:
        monitor = self.monitor if slow is self.slow_weights[0] else None
        if monitor is not None:
            monitor.after_step(trainer, slow)
        if slow.due:
            slow.sync()
            if monitor is not None:
                monitor.after_sync(trainer, slow)

    def _log(self, trainer: Trainer, pl_module: LightningModule, slow: SlowWeights, suffix: str) -> None:
        if trainer.barebones:
            return
        if self.log_syncs:
            # A CPU tensor: with a number Lightning makes one on the device, which the progress bar then waits for.
            pl_module.log(f"lookahead/syncs{suffix}", torch.tensor(float(slow.syncs)), prog_bar=True)
        if slow.last_distance is not None:
            pl_module.log(f"lookahead/distance{suffix}", slow.last_distance, prog_bar=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None:
            self.monitor.end(trainer)
        self._finish(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)  # on_train_end is left out where no batch was trained

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._recalibration.stop()
        for slow in self._counting():
            slow.put("fast")
        self._stop_counting()
        if self._before_loading and trainer.state.fn == "fit":
            pl_module.load_state_dict(self._before_loading)
        self._before_loading = {}

    def _finish(self, trainer: Trainer) -> None:
        self._before_loading = {}
        for slow in self._counting():
            if not any(is_a(callback, AVERAGERS) for callback in callbacks_of(trainer)):
                slow.put(self.eval_weights)
        self._stop_counting()
        for slow in self.slow_weights:
            slow.put(slow.holds)  # after on_train_end Lightning has moved the module to the CPU: follow it

    def _stop_counting(self) -> None:
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        for slow in self.slow_weights:
            slow.stop()

    def _counting(self) -> list[SlowWeights]:
        """Those of a fit that is under way: none before it, after it or after an exception in it."""
        return [slow for slow in self.slow_weights if slow.counting]

    # -- either set of weights

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for slow in self._counting():
            slow.put(self.eval_weights)
        if self.recalibrate_batch_norm and self._counting() and not trainer.sanity_checking:
            self._recalibration.start(trainer, self.recalibrate_batch_norm)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recalibration.stop()
        for slow in self._counting():
            slow.put("fast")

    @contextmanager
    def use_weights(self, weights: Weights) -> Iterator[None]:
        """Let the module hold the ``"slow"`` or ``"fast"`` weights inside the ``with`` block, in place.

        After it the module holds what it held before, also if an exception was raised inside. During a fit and after
        it, until the next one starts.

        Raises:
            ValueError: If ``weights`` is neither.
            RuntimeError: If this process has started no fit.
        """
        check_weights(weights)
        if not self.slow_weights:
            message = (
                "There is one set of weights only: use_weights() works from the start of a fit on, in the process that"
                " trains (strategies that spawn or fork bring back phi alone)."
            )
            raise RuntimeError(message)
        with ExitStack() as stack:
            for slow in self.slow_weights:
                stack.enter_context(slow.use(weights))
            yield

    # -- checkpoints

    def _slow_state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """What ``strategy.lightning_module_state_dict()`` returns during a fit and after it: phi, swapped or not."""
        original = functools.partial(type(strategy).lightning_module_state_dict, strategy)
        if not self._serves(strategy.optimizers):  # the strategy has gone on to another fit, without this callback
            return original()
        state_dict = None if self._recalibration.kept else state_dict_of_slow(original, self.slow_weights)
        if state_dict is None:
            # Sharded, left out or computed from the parameters: then phi has to be there while that is done.
            with self.use_weights("slow"), self._recalibration.undone():
                state_dict = original()
                detach_aliases(state_dict)
        return state_dict

    def _load_checkpoint(self, strategy: Strategy, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``strategy.load_checkpoint()`` returns; our part of it is checked before anything is loaded from it."""
        original = functools.partial(type(strategy).load_checkpoint, strategy)
        if not strategy.restore_checkpoint_after_setup:
            if not self.slow_weights and strategy.lightning_module is not None:  # a run that is about to begin
                state_dict = strategy.lightning_module.state_dict()
                self._before_loading = dict(zip(state_dict, copies(state_dict.values()), strict=True))
            checkpoint = original(path, *args, **kwargs)
            if self.state_key in (checkpoint.get("callbacks") or {}):
                check_saved(checkpoint["callbacks"][self.state_key])
            return checkpoint
        # These strategies load the optimizers here, too, and in place.
        carried = carried_in(strategy.broadcast(path), kwargs.get("weights_only"))
        with ExitStack() as stack:
            for slow in self.slow_weights:
                stack.enter_context(slow.expecting(carried))
            return original(path, *args, **kwargs)

    def _serves(self, optimizers: list[Any]) -> bool:
        return [id(slow.optimizer) for slow in self.slow_weights] == [id(optimizer) for optimizer in optimizers]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Settings and counters, without tensors: the weights travel in the module's and the optimizers' states."""
        counters = [slow.state_dict() for slow in self.slow_weights]
        state = {
            "lookahead_version": VERSION,
            **self._settings(),
            "optimizers": [{name: state[name] for name in state if name not in self._settings()} for state in counters],
        }
        return state if self.monitor is None else {**state, "monitor": self.monitor.state_dict()}

    def _settings(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "alpha": self.alpha,
            "eval_weights": self.eval_weights,
            "pullback_momentum": self.pullback_momentum,
        }

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = names_of(pl_module)
        state = checkpoint["callbacks"][self.state_key]
        state["names"] = [[names.get(p, []) for p in parameters_of(optimizer)] for optimizer in trainer.optimizers]
        state["tied"] = self._tied
        if self.slow_weights and not self._serves(trainer.optimizers):  # the counters are of another fit
            state["optimizers"] = []

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        saved = checkpoint["callbacks"].get(self.state_key)
        if saved is None:
            warnings.warn(
                "The checkpoint was made without LookaheadCallback: slow and fast weights both start from its weights.",
                stacklevel=2,
            )
            self._foreign = True
            self._load_counters()
            return
        check_saved(saved)
        warn_of_differences(saved, self._settings())
        self._restored = saved["optimizers"]
        if self.monitor is not None and "monitor" in saved:
            self.monitor.load_state_dict(saved["monitor"])
        self._load_counters()

    def _load_counters(self) -> None:
        # The Trainer loads callbacks before there are optimizers (one device, DDP) or after (sharded strategies).
        if not self.slow_weights:
            return
        if self._restored and len(self._restored) != len(self.slow_weights):
            message = (
                f"The checkpoint was made with {len(self._restored)} optimizers, and configure_optimizers gives"
                f" {len(self.slow_weights)}: resume with the same optimizers."
            )
            raise ValueError(message)
        for slow, counters in zip(self.slow_weights, self._restored, strict=False):
            slow.load_state_dict(counters)
        if self._foreign:
            for slow in self.slow_weights:
                slow.start_over()
        self._restored, self._foreign = [], False
