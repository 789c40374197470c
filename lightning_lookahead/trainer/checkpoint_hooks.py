"""What a Trainer saves and loads of the slow weights; the only place that patches a strategy."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead._lightning import writes_folders
from lightning_lookahead.outer_loop.names import names_in
from lightning_lookahead.outer_loop.saved_format import OTHER, SHARDS, TENSORS, VERSION, check_saved, upgrade
from lightning_lookahead.outer_loop.settings import warn_of_differences
from lightning_lookahead.outer_loop.sharding import detach_aliases
from lightning_lookahead.outer_loop.shards import load_folder
from lightning_lookahead.outer_loop.tensors import copies, storage_key

from .module_state import state_dict_of_slow
from .outer_loops import OTHERS_LOADED
from .pruned import make_permanent

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor

    from lightning_lookahead.evaluation.monitor import InnerOuterMonitor
    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights

    from .outer_loops import OuterLoops
    from .validation_swap import ValidationSwap


@dataclass(eq=False)
class CheckpointHooks:
    """Both sets of weights in the checkpoints of a fit, whoever saves and whenever, and out of them.

    A checkpoint's ``state_dict`` holds one set, whatever the module holds at that moment; the callback's own state
    holds the other.

    Args:
        key: What the callback's state goes by in a checkpoint.
        settings: What a checkpoint says of the run; a run that goes on with others is told so.
        loops: The slow weights.
        weights: The set that the ``state_dict`` holds.
        swap: What a validation has swapped in.
        monitor: What else is saved.
    """

    key: str
    settings: dict[str, Any]
    loops: OuterLoops
    weights: Weights
    swap: ValidationSwap
    monitor: InnerOuterMonitor | None
    _aliases: list[list[str]] = field(default_factory=list)  # names that share a parameter, before it was wrapped
    _restored: list[dict[str, Any]] = field(default_factory=list)  # from a checkpoint, until there are optimizers
    _restored_model: dict[str, Any] = field(default_factory=dict)  # the module's own state that came with them
    _before_loading: dict[str, Tensor] = field(default_factory=dict)  # the module's state, while one is loaded over it
    _optimizers_before: list[Any] | None = None  # the strategy's, before a fit sets up its own
    _in_batch: bool = False  # whether a forward may have been done whose backward is to come
    _shown: list[SlowWeights] = field(default_factory=list)  # what is swapped while others look at it
    _replaced: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)  # what a state_dict had before

    # -- a fit

    def await_checkpoint(self, strategy: Strategy, pl_module: LightningModule) -> None:
        """Look at what the strategy loads, from the setup of a fit on."""
        self._aliases = [names for names in names_in(pl_module).values() if len(names) > 1]
        self._optimizers_before = strategy.optimizers
        strategy.load_checkpoint = functools.partial(self._load_checkpoint, strategy)  # type: ignore[method-assign]

    def serve(self, strategy: Strategy) -> None:
        """Restore what was loaded already, and see that checkpoints hold the weights that they should."""
        self._load_states()
        # Lightning asks the strategy, once, for the weights of every checkpoint; with save_weights_only=True no hook of
        # a callback is called. A partial, unlike a closure, leaves the strategy picklable.
        strategy.lightning_module_state_dict = functools.partial(  # type: ignore[method-assign]
            self._module_state_dict, strategy
        )
        # What comes last in a validation, after the hooks of all callbacks and of the module.
        strategy.save_checkpoint = functools.partial(self._save_checkpoint, strategy)  # type: ignore[method-assign]
        strategy.on_validation_end = functools.partial(self._on_validation_end, strategy)  # type: ignore[method-assign]

    def begin_batch(self) -> None:
        """From here on a backward may be to come."""
        self._end_showing()
        self._in_batch = True

    def end_batch(self) -> None:
        """From here on the module may be looked at."""
        self._in_batch = False

    def keep_loaded(self) -> None:
        """Say that what was loaded will not be undone."""
        self._before_loading = {}

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an exception, let the module hold what it held before a checkpoint was loaded that was refused."""
        self._in_batch, self._shown = False, []
        if self._before_loading and trainer.state.fn == "fit":
            pl_module.load_state_dict(self._before_loading)
        self._before_loading = {}

    def _on_validation_end(self, strategy: Strategy) -> None:
        type(strategy).on_validation_end(strategy)
        self.swap.end()

    # -- saving

    def _save_checkpoint(self, strategy: Strategy, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._end_showing()
        ours = (checkpoint.get("callbacks") or {}).get(self.key)
        module = strategy.lightning_module
        if ours is not None and ours["optimizers"] and module is not None and "state_dict" in checkpoint:
            make_permanent(checkpoint["state_dict"], module, ours["optimizers"], self.loops.slow_weights)
        type(strategy).save_checkpoint(strategy, checkpoint, *args, **kwargs)

    def _module_state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """What ``strategy.lightning_module_state_dict()`` returns during a fit and after it, swapped or not."""
        original = functools.partial(type(strategy).lightning_module_state_dict, strategy)
        # The strategy has gone on to another fit, without this callback, or other weights were loaded into the module.
        if not self.loops.are_of(strategy.optimizers) or self.loops.others_loaded:
            return original()
        if self.weights == "fast" and all(slow.active == "fast" for slow in self.loops.slow_weights):
            return original()
        for slow in self.loops.slow_weights:
            slow.persistence.adopt()
        state_dict = None
        if self.weights == "slow" and not self.swap.recalibration.kept:
            state_dict = state_dict_of_slow(original, self.loops.slow_weights)
        if state_dict is None:
            # Sharded, left out, computed from the parameters or swapped: then the weights have to be there for it.
            other = [slow for slow in self.loops.slow_weights if slow.active != self.weights]
            with self.loops.use(self.weights, statistics=False), self.swap.recalibration.undone():
                state_dict = original()
                detach_aliases(state_dict)
            # The module's own statistics are not written to: a backward may be to come that would notice.
            for name, value in (pair for slow in other for pair in slow.statistics.counterparts().items()):
                if name in state_dict:
                    state_dict[name] = value.to(state_dict[name].device)
        return state_dict

    def state_dict(self) -> dict[str, Any]:
        """Settings and counts, without a tensor: those are put beside them where it is known how they are written."""
        state = {
            "lookahead_version": VERSION,
            **self.settings,
            "optimizers": [slow.persistence.counters() for slow in self.loops.slow_weights],
            "aliases": self._aliases,
        }
        return state if self.monitor is None else {**state, "monitor": self.monitor.state_dict()}

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Put the other set beside the settings, and what is written in shards where shards are."""
        state = checkpoint["callbacks"][self.key]
        if not self.loops.are_of(trainer.optimizers):  # the weights are of another fit
            state["optimizers"] = []
            return
        if self.loops.others_loaded:
            warnings.warn(f"Lookahead: this checkpoint has one set of weights only: {OTHERS_LOADED}", stacklevel=2)
            state["optimizers"] = []
            return
        folder = writes_folders(trainer.strategy)
        with self.swap.recalibration.undone():
            states = [slow.persistence.state_dict(whole=not folder, lean=True) for slow in self.loops.slow_weights]
        if folder:
            # What is written by each rank is the module's state and the optimizers': there, torch looks for nothing of
            # this name.
            tensors = {
                str(at): {part: own.pop(part) for part in TENSORS if part in own} for at, own in enumerate(states)
            }
            first, *others = checkpoint["optimizer_states"]
            checkpoint["optimizer_states"] = [{**first, SHARDS: tensors}, *others]
        state["optimizers"] = states
        self._show_to_others(checkpoint["state_dict"])

    def _show_to_others(self, state_dict: dict[str, Any]) -> None:
        """Let the module hold what the checkpoint does while others look at it in their ``on_save_checkpoint``.

        Not within a batch, where a backward may be to come that would notice, and not where the weights are sharded,
        whose ``state_dict`` may be views of them. The strategy's ``save_checkpoint`` ends
        it, or the next batch where that is never called. What of the ``state_dict`` is not a copy goes with the swap.
        """
        if self._in_batch or any(slow.parameters.sharded for slow in self.loops.slow_weights):
            return
        self._shown = [
            slow for slow in self.loops.slow_weights if slow.inner_loop.watches and slow.active != self.weights
        ]
        live = {storage_key(value): p for slow in self._shown for p, value in slow.values(self.weights).items()}
        for slow in self._shown:
            slow.swap_to(self.weights)
        for name, value in state_dict.items():
            parameter = live.get(storage_key(value)) if isinstance(value, torch.Tensor) else None
            if parameter is not None:
                self._replaced.append((state_dict, name, value))
                state_dict[name] = parameter.detach()

    def _end_showing(self) -> None:
        shown, self._shown = self._shown, []
        for slow in shown:
            slow.swap_to(OTHER[self.weights])
        for state_dict, name, value in self._replaced:
            state_dict[name] = value
        self._replaced = []

    # -- loading

    def _load_checkpoint(self, strategy: Strategy, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``strategy.load_checkpoint()`` returns; our part of it is checked before anything is loaded from it."""
        original = functools.partial(type(strategy).load_checkpoint, strategy)
        module = strategy.lightning_module
        if strategy.restore_checkpoint_after_setup or module is None:  # they load the module and optimizers here, too
            checkpoint = original(path, *args, **kwargs)
            folder = strategy.broadcast(path)
            ours = (checkpoint.get("callbacks") or {}).get(self.key)
            if ours is not None and self.loops.slow_weights and module is not None and module.trainer.state.fn == "fit":
                check_saved(ours)
                load_folder(folder, ours["optimizers"], self.loops.slow_weights)
            return checkpoint
        if strategy.optimizers is self._optimizers_before:  # the run is about to begin: no sweep of a tuner is undone
            state_dict = module.state_dict()
            self._before_loading = dict(zip(state_dict, copies(state_dict.values()), strict=True))
        checkpoint = original(path, *args, **kwargs)
        ours = (checkpoint.get("callbacks") or {}).get(self.key)
        if ours is not None:
            upgrade(checkpoint, ours)
            check_saved(ours)
        return checkpoint

    def on_load_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint has for the fit that goes on from it."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint["callbacks"].get(self.key)
        if saved is None:
            warnings.warn(
                "The checkpoint was made without LookaheadCallback: slow and fast weights both start from its weights.",
                stacklevel=2,
            )
            return
        check_saved(saved)
        warn_of_differences(saved, self.settings)
        # Out of the callback's state, of which Lightning makes a deep copy for `load_state_dict`.
        self._restored = saved.pop("optimizers")
        saved["optimizers"] = []
        first: dict[str, Any] = next(iter(checkpoint.get("optimizer_states", [])), {})
        carried = first.get(SHARDS, {})  # a folder that was made one file
        for at, state in enumerate(self._restored):
            state.update(carried.get(str(at), {}))
        # WeightAveraging puts its average in the place of what the module held, and that beside it.
        self._restored_model = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
        if self.monitor is not None and "monitor" in saved:
            self.monitor.load_state_dict(saved["monitor"])
        self._load_states()

    def _load_states(self) -> None:
        # The Trainer loads callbacks before there are optimizers (one device, DDP) or after (sharded strategies).
        if not self.loops.slow_weights:
            return
        if self._restored and len(self._restored) != len(self.loops.slow_weights):
            message = (
                f"The checkpoint was made with {len(self._restored)} optimizers, and configure_optimizers gives"
                f" {len(self.loops.slow_weights)}: resume with the same optimizers."
            )
            raise ValueError(message)
        for slow, state in zip(self.loops.slow_weights, self._restored, strict=False):
            slow.persistence.load_state_dict(state, self._restored_model)  # whose settings are those of the callback
        self._restored, self._restored_model = [], {}
