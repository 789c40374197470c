"""Both sets of weights in a Trainer's checkpoints, by patches of its strategy."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead._lightning import writes_folders
from lightning_lookahead.outer_loop.names import names_in
from lightning_lookahead.outer_loop.saved_format import OTHER, SHARDS, TENSORS, VERSION, check_saved, upgrade
from lightning_lookahead.outer_loop.settings import warn_of_differences
from lightning_lookahead.outer_loop.sharding import detach_aliases
from lightning_lookahead.outer_loop.shards import load_folder
from lightning_lookahead.outer_loop.tensors import copies, storage_key

from . import rank_states
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

    from .apart import Apart
    from .outer_loops import OuterLoops
    from .validation_swap import ValidationSwap


@dataclass(eq=False)
class CheckpointHooks:
    """Saves both sets of weights in each checkpoint of a fit, whoever saves it and whenever, and loads them.

    A checkpoint's ``state_dict`` holds one set, whatever the module holds at that moment. The callback's state holds
    the other set.

    Args:
        key: The key of the callback's state in a checkpoint.
        settings: The settings that a checkpoint holds. A run that resumes with others is warned.
        loops: The outer loops.
        weights: The set that the ``state_dict`` holds.
        swap: The validation swap: it may be on when a checkpoint is saved.
        monitor: A monitor whose history is saved, too.

    Attributes:
        apart: The ranks, if they train apart.
        own_buffers: Buffers of this rank's own in the loaded checkpoint.
        in_batch: Whether a backward may be to come.
    """

    key: str
    settings: dict[str, Any]
    loops: OuterLoops
    weights: Weights
    swap: ValidationSwap
    monitor: InnerOuterMonitor | None

    def __post_init__(self) -> None:
        self.apart: Apart | None = None
        self._parts = False  # whether the ranks of this fit train apart
        self.own_buffers: dict[str, Tensor] = {}
        self._aliases: list[list[str]] = []  # names that share a parameter, before it was wrapped
        self._restored: list[dict[str, Any]] = []  # states from a checkpoint, until there are optimizers
        self._restored_model: dict[str, Any] = {}  # the module's state in that checkpoint
        self._before_loading: dict[str, Tensor] = {}  # the module's state before a checkpoint was loaded
        self._optimizers_before: list[Any] | None = None  # the strategy's, before the fit sets up its own
        self.in_batch = False
        self._others_loaded: bool | None = None  # the answer of this checkpoint
        self._shown: list[SlowWeights] = []  # swapped while others look at a checkpoint
        self._replaced: list[tuple[dict[str, Any], str, Tensor]] = []  # state_dict, name, value before

    # -- a fit

    def await_checkpoint(self, strategy: Strategy, pl_module: LightningModule, *, parts: bool) -> None:
        """Check what the strategy loads, from the setup of a fit on.

        Args:
            strategy: The strategy.
            pl_module: The module.
            parts: Whether the ranks train apart.
        """
        self._parts = parts
        self._aliases = [names for names in names_in(pl_module).values() if len(names) > 1]
        self._optimizers_before = strategy.optimizers
        strategy.load_checkpoint = functools.partial(self._load_checkpoint, strategy)  # type: ignore[method-assign]

    def serve(self, strategy: Strategy) -> None:
        """Restore what was loaded before there were optimizers; from now on serve what the strategy saves."""
        self._load_states()
        # Lightning asks the strategy once for the weights of a checkpoint; with save_weights_only=True it calls no hook
        # of a callback. A partial, unlike a closure, leaves the strategy picklable.
        strategy.lightning_module_state_dict = functools.partial(  # type: ignore[method-assign]
            self._module_state_dict, strategy
        )
        # The strategy's hook comes last in a validation, after those of all callbacks and of the module.
        strategy.save_checkpoint = functools.partial(self._save_checkpoint, strategy)  # type: ignore[method-assign]
        strategy.on_validation_end = functools.partial(self._on_validation_end, strategy)  # type: ignore[method-assign]

    def begin_batch(self) -> None:
        """Note that a batch begins: a backward may be to come."""
        if self._shown:
            self._end_showing()
        self.in_batch = True

    def keep_loaded(self) -> None:
        """Drop what `undo` would restore: the loaded checkpoint was accepted."""
        self._before_loading = {}

    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an exception, restore the module's state of before the checkpoint was loaded, if that was refused."""
        self.in_batch, self._shown, self._replaced = False, [], []
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
        # Without this callback, another fit may have begun, or other weights may have been loaded into the module.
        self._others_loaded = self.loops.others_loaded
        if not self.loops.are_of(strategy.optimizers) or self._others_loaded:
            return original()
        if self.weights == "fast" and all(slow.active == "fast" for slow in self.loops.slow_weights):
            return original()
        for slow in self.loops.slow_weights:
            slow.persistence.adopt()
        state_dict = None
        if self.weights == "slow" and not self.swap.recalibration.replaced:
            state_dict = state_dict_of_slow(original, self.loops.slow_weights)
        if state_dict is None:
            # Sharded, swapped, left out or computed from the parameters: the module itself has to hold the weights.
            other = [slow for slow in self.loops.slow_weights if slow.active != self.weights]
            with self.loops.use(self.weights, statistics=False), self.swap.recalibration.undone():
                state_dict = original()
                detach_aliases(state_dict)
            # The module's own statistics are not written to: a backward that is to come would notice.
            for name, value in (pair for slow in other for pair in slow.statistics.named_counterparts().items()):
                if name in state_dict:
                    state_dict[name] = value.to(state_dict[name].device)
        return state_dict

    def state_dict(self) -> dict[str, Any]:
        """Settings and counts. `on_save_checkpoint` adds the tensors: it knows how the strategy writes them."""
        state = {
            "lookahead_version": VERSION,
            **self.settings,
            "optimizers": [slow.persistence.counters() for slow in self.loops.slow_weights],
            "aliases": self._aliases,
        }
        return state if self.monitor is None else {**state, "monitor": self.monitor.state_dict()}

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the other set of weights to the callback's state, or to the optimizers' where shards are written."""
        state = checkpoint["callbacks"][self.key]
        if not self.loops.are_of(trainer.optimizers):  # the weights are of another fit
            state["optimizers"] = []
            return
        # Lightning has asked for the module's state just before: after a fit the answer takes long.
        loaded = self.loops.others_loaded if self._others_loaded is None else self._others_loaded
        self._others_loaded = None
        if self.apart is not None and self.apart.active and not trainer.interrupted:
            loaded = self.apart.workers.any(loaded)
        if loaded:
            warnings.warn(f"Lookahead: this checkpoint has one set of weights only: {OTHERS_LOADED}", stacklevel=2)
            state["optimizers"] = []
            return
        folder = writes_folders(trainer.strategy)
        with self.swap.recalibration.undone():
            states = [slow.persistence.state_dict(whole=not folder, lean=True) for slow in self.loops.slow_weights]
        if folder:
            # Each rank writes its part of the module's and of the optimizers' state, and of nothing else.
            tensors = {
                str(at): {part: own.pop(part) for part in TENSORS if part in own} for at, own in enumerate(states)
            }
            first, *others = checkpoint["optimizer_states"]
            checkpoint["optimizer_states"] = [{**first, SHARDS: tensors}, *others]
        state["optimizers"] = states
        if self.apart is not None and self.apart.active:
            rank_states.save(trainer, checkpoint, state, self.apart, self.loops)
        self._show_to_others(checkpoint["state_dict"], states)

    def _show_to_others(self, state_dict: dict[str, Any], states: list[dict[str, Any]]) -> None:
        """Let the module hold the weights of the checkpoint while other callbacks see it in ``on_save_checkpoint``.

        Not within a batch: a backward that is to come would notice. Not if the weights are sharded: the ``state_dict``
        may be views of them. The strategy's ``save_checkpoint`` ends it, or else the next batch. Values of the
        ``state_dict`` and of our own states that are not copies change with the swap, and are replaced until then.
        """
        if self.in_batch or any(slow.parameters.sharded for slow in self.loops.slow_weights):
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
        other = OTHER[self.weights]
        for slow, state in zip(self.loops.slow_weights, states, strict=True):
            own, names = state.get("weights", {}).get(other, {}), slow.parameters.names()
            for parameter, value in slow.values(other).items() if slow in self._shown else ():
                if names[parameter] in own:
                    self._replaced.append((own, names[parameter], own[names[parameter]]))
                    own[names[parameter]] = value.detach()

    def _end_showing(self) -> None:
        shown, self._shown = self._shown, []
        for slow in shown:
            slow.swap_to(OTHER[self.weights])
        for state_dict, name, value in self._replaced:
            state_dict[name] = value
        self._replaced = []

    # -- loading

    def _load_checkpoint(self, strategy: Strategy, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``strategy.load_checkpoint()`` returns. The callback's state is checked before anything is loaded."""
        original = functools.partial(type(strategy).load_checkpoint, strategy)
        module = strategy.lightning_module
        if strategy.restore_checkpoint_after_setup or module is None:  # then module and optimizers are loaded here, too
            checkpoint = original(path, *args, **kwargs)
            folder = strategy.broadcast(path)
            ours = (checkpoint.get("callbacks") or {}).get(self.key)
            if ours is not None and self.loops.slow_weights and module is not None and module.trainer.state.fn == "fit":
                check_saved(ours)
                load_folder(folder, ours["optimizers"], self.loops.slow_weights)
            return checkpoint
        if strategy.optimizers is self._optimizers_before:  # not within a tuner's sweep, which restores by itself
            state_dict = module.state_dict()
            self._before_loading = dict(zip(state_dict, copies(state_dict.values()), strict=True))
        checkpoint = original(path, *args, **kwargs)
        ours = (checkpoint.get("callbacks") or {}).get(self.key)
        if ours is not None:
            upgrade(checkpoint, ours)
            check_saved(ours)
            if module.trainer.state.fn == "fit":
                early = any(loop["steps"] < self.settings["start_step"] for loop in ours["optimizers"])
                shares = not self._parts or early  # from here on: all ranks have to be the same
                own = (0, 1) if shares else (module.trainer.global_rank, module.trainer.world_size)
                self.own_buffers = rank_states.take(checkpoint, ours, *own)
        return checkpoint

    def on_load_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Take the states in a checkpoint, for the fit that resumes from it."""
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
        # Taken out of the callback's state: Lightning makes a deep copy of that for `load_state_dict`.
        self._restored = saved.pop("optimizers")
        saved["optimizers"] = []
        first: dict[str, Any] = next(iter(checkpoint.get("optimizer_states", [])), {})
        carried = first.get(SHARDS, {})  # a file that was made of a folder
        for at, state in enumerate(self._restored):
            state.update(carried.get(str(at), {}))
        # WeightAveraging saves its average as the state_dict, and what the module held beside it.
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
            # Not slow.load_state_dict, which would warn of settings a second time.
            slow.persistence.load_state_dict(state, self._restored_model)
        self._restored, self._restored_model = [], {}
