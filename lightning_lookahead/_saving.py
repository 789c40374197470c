"""The half of `LookaheadCallback` that saves and restores: what Lightning asks it, and what it asks of Lightning."""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_lookahead._batch_norm import Recalibration
from lightning_lookahead._carried import Weights, carried_in
from lightning_lookahead._checks import VERSION, check_saved, check_weights, warn_of_differences
from lightning_lookahead._lightning import Callback, names_of
from lightning_lookahead._module_state import detach_aliases, state_dict_of_slow
from lightning_lookahead._tensors import copies
from lightning_lookahead._tracked import parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor

    from lightning_lookahead.monitor import InnerOuterMonitor
    from lightning_lookahead.slow_weights import SlowWeights


class SavingCallback(Callback):
    """Slow weights that a Trainer's checkpoints hold; `LookaheadCallback` makes and moves them."""

    eval_weights: Weights
    monitor: InnerOuterMonitor | None

    def __init__(self) -> None:
        super().__init__()
        self.slow_weights: list[SlowWeights] = []
        """One for each optimizer, from the start of a fit until the next fit starts."""
        self._recalibration = Recalibration()
        self._tied: list[list[str]] = []  # names that share a parameter, before a strategy wrapped the module
        self._restored: list[dict[str, Any]] = []  # counters from a checkpoint, until there are optimizers to count for
        self._before_loading: dict[str, Tensor] = {}  # the module's state, while a checkpoint is loaded over it
        self._foreign = False  # the checkpoint was made without us

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint says of the run; a run that goes on with other values is told so."""
        raise NotImplementedError

    def _await_checkpoint(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a fit: forget the one before it, and look at what the strategy loads."""
        for slow in self.slow_weights:
            slow.close()
        self.slow_weights, self._restored, self._foreign, self._before_loading = [], [], False, {}
        self._tied = [names for names in names_of(pl_module).values() if len(names) > 1]
        strategy = trainer.strategy
        strategy.load_checkpoint = functools.partial(self._load_checkpoint, strategy)  # type: ignore[method-assign]

    def _serve_checkpoints(self, strategy: Strategy) -> None:
        """Restore counters that were loaded already, and see that checkpoints hold the weights that they should."""
        self._load_counters()
        # Lightning asks the strategy, once, for the weights of every checkpoint; with save_weights_only=True no hook of
        # a callback is called. A partial, unlike a closure, leaves the strategy picklable.
        strategy.lightning_module_state_dict = functools.partial(  # type: ignore[method-assign]
            self._module_state_dict, strategy
        )

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

    def _module_state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """What ``strategy.lightning_module_state_dict()`` returns during a fit and after it, swapped or not."""
        original = functools.partial(type(strategy).lightning_module_state_dict, strategy)
        if not self._serves(strategy.optimizers):  # the strategy has gone on to another fit, without this callback
            return original()
        if self.eval_weights == "fast" and all(slow.holds == "fast" for slow in self.slow_weights):
            return original()
        state_dict = None
        if self.eval_weights == "slow" and not self._recalibration.kept:
            state_dict = state_dict_of_slow(original, self.slow_weights)
        if state_dict is None:
            # Sharded, left out, computed from the parameters or swapped: then the weights have to be there for it.
            with self.use_weights(self.eval_weights), self._recalibration.undone():
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

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = names_of(pl_module)
        state = checkpoint["callbacks"][self.state_key]
        state["names"] = [[names.get(p, []) for p in parameters_of(optimizer)] for optimizer in trainer.optimizers]
        state["tied"] = self._tied
        names_of_buffers = {buffer: name for name, buffer in pl_module.named_buffers()}
        state["statistics"] = [
            [names_of_buffers.get(buffer, "") for buffer in slow.buffers.live] if slow.buffers is not None else []
            for slow in self.slow_weights
        ]
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
