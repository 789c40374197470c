"""The half of `LookaheadCallback` that saves and restores: what Lightning asks it, and what it asks of Lightning."""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_lookahead._batch_norm import Recalibration
from lightning_lookahead._lightning import Callback, writes_folders
from lightning_lookahead._module_state import state_dict_of_slow
from lightning_lookahead._names import names_in
from lightning_lookahead._pruned import make_permanent
from lightning_lookahead._saved_format import (
    OTHER,
    SHARDS,
    TENSORS,
    VERSION,
    Weights,
    check_saved,
    check_weights,
    upgrade,
)
from lightning_lookahead._settings import warn_of_differences
from lightning_lookahead._sharding import detach_aliases
from lightning_lookahead._shards import load_folder
from lightning_lookahead._tensors import copies, place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy
    from torch import Tensor

    from lightning_lookahead.monitor import InnerOuterMonitor
    from lightning_lookahead.slow_weights import SlowWeights


OTHERS_LOADED = (
    "the module does not hold the weights that the fit has left in it (others were loaded since), and the second set is"
    " of that fit. Both sets of a checkpoint are in it: compare_weights(..., ckpt_path=path) or load_weights(path)."
)


class SavingCallback(Callback):
    """Slow weights that a Trainer's checkpoints hold; `LookaheadCallback` makes and moves them."""

    eval_weights: Weights
    monitor: InnerOuterMonitor | None

    def __init__(self) -> None:
        super().__init__()
        self.slow_weights: list[SlowWeights]
        """One for each optimizer, from the start of a fit until the next fit starts."""
        self._recalibration: Recalibration
        self._left: list[list[int]]  # the fingerprints of both sets of each when the fit ended
        self._aliases: list[list[str]]  # names that share a parameter, before a strategy wrapped the module
        self._restored: list[dict[str, Any]]  # states from a checkpoint, until there are optimizers for them
        self._restored_model: dict[str, Any]  # the module's own state that came with them
        self._before_loading: dict[str, Tensor]  # the module's state, while a checkpoint is loaded over it
        self._in_batch: bool  # whether a forward may have been done whose backward is to come
        self._shown: list[SlowWeights]  # what is swapped while others look at it
        self._replaced: list[tuple[dict[str, Any], str, Tensor]]  # what a state_dict had before that
        self._optimizers_before: list[Any] | None  # the strategy's, before a fit sets up its own
        self.__dict__.update(self._nothing_trained())

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint says of the run; a run that goes on with other values is told so."""
        raise NotImplementedError

    def _nothing_trained(self) -> dict[str, Any]:
        """The attributes of a callback that has trained nothing yet."""
        return {
            "slow_weights": [],
            "_recalibration": Recalibration(),
            "_left": [],
            "_aliases": [],
            "_restored": [],
            "_restored_model": {},
            "_before_loading": {},
            "_optimizers_before": None,
            "_in_batch": False,
            "_shown": [],
            "_replaced": [],
        }

    def _after_validation(self) -> None:
        """Let the module hold the fast weights again."""
        raise NotImplementedError

    def _await_checkpoint(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a fit: forget the one before it, and look at what the strategy loads."""
        for slow in self.slow_weights:
            slow.close()
        self.__dict__.update(self._nothing_trained())
        self._aliases = [names for names in names_in(pl_module).values() if len(names) > 1]
        strategy = trainer.strategy
        self._optimizers_before = strategy.optimizers
        strategy.load_checkpoint = functools.partial(self._load_checkpoint, strategy)  # type: ignore[method-assign]

    def _serve_checkpoints(self, strategy: Strategy) -> None:
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

    def _save_checkpoint(self, strategy: Strategy, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._end_showing()
        ours = (checkpoint.get("callbacks") or {}).get(self.state_key)
        module = strategy.lightning_module
        if ours is not None and ours["optimizers"] and module is not None and "state_dict" in checkpoint:
            make_permanent(checkpoint["state_dict"], module, ours["optimizers"], self.slow_weights)
        type(strategy).save_checkpoint(strategy, checkpoint, *args, **kwargs)

    def _on_validation_end(self, strategy: Strategy) -> None:
        type(strategy).on_validation_end(strategy)
        self._after_validation()

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
        if self.others_loaded:
            message = f"use_weights({weights!r}): {OTHERS_LOADED}"
            raise RuntimeError(message)
        with ExitStack() as stack:
            for slow in self.slow_weights:
                stack.enter_context(slow.use(weights))
            yield

    @property
    def others_loaded(self) -> bool:
        """Whether the module holds other weights than those that the fit has left in it: both sets are of that fit."""
        return any(slow.fingerprint() != left for slow, left in zip(self.slow_weights, self._left, strict=False))

    def _module_state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """What ``strategy.lightning_module_state_dict()`` returns during a fit and after it, swapped or not."""
        original = functools.partial(type(strategy).lightning_module_state_dict, strategy)
        # The strategy has gone on to another fit, without this callback, or other weights were loaded into the module.
        if not self._serves(strategy.optimizers) or self.others_loaded:
            return original()
        if self.eval_weights == "fast" and all(slow.active == "fast" for slow in self.slow_weights):
            return original()
        for slow in self.slow_weights:
            slow.persistence.adopt()
        state_dict = None
        if self.eval_weights == "slow" and not self._recalibration.kept:
            state_dict = state_dict_of_slow(original, self.slow_weights)
        if state_dict is None:
            # Sharded, left out, computed from the parameters or swapped: then the weights have to be there for it.
            other = [slow for slow in self.slow_weights if slow.active != self.eval_weights]
            with ExitStack() as stack:
                for slow in self.slow_weights:
                    stack.enter_context(slow.use(self.eval_weights, statistics=False))
                stack.enter_context(self._recalibration.undone())
                state_dict = original()
                detach_aliases(state_dict)
            # The module's own statistics are not written to: a backward may be to come that would notice.
            for name, value in (pair for slow in other for pair in slow.statistics.counterparts().items()):
                if name in state_dict:
                    state_dict[name] = value.to(state_dict[name].device)
        return state_dict

    def _load_checkpoint(self, strategy: Strategy, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What ``strategy.load_checkpoint()`` returns; our part of it is checked before anything is loaded from it."""
        original = functools.partial(type(strategy).load_checkpoint, strategy)
        module = strategy.lightning_module
        if strategy.restore_checkpoint_after_setup or module is None:  # they load the module and optimizers here, too
            checkpoint = original(path, *args, **kwargs)
            folder = strategy.broadcast(path)
            ours = (checkpoint.get("callbacks") or {}).get(self.state_key)
            if ours is not None and self.slow_weights and module is not None and module.trainer.state.fn == "fit":
                check_saved(ours)
                load_folder(folder, ours["optimizers"], self.slow_weights)
            return checkpoint
        if strategy.optimizers is self._optimizers_before:  # the run is about to begin: no sweep of a tuner is undone
            state_dict = module.state_dict()
            self._before_loading = dict(zip(state_dict, copies(state_dict.values()), strict=True))
        checkpoint = original(path, *args, **kwargs)
        ours = (checkpoint.get("callbacks") or {}).get(self.state_key)
        if ours is not None:
            upgrade(checkpoint, ours)
            check_saved(ours)
        return checkpoint

    def _serves(self, optimizers: list[Any]) -> bool:
        return [id(slow.optimizer) for slow in self.slow_weights] == [id(optimizer) for optimizer in optimizers]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Settings and counts, without a tensor: those are put beside them where it is known how they are written."""
        state = {
            "lookahead_version": VERSION,
            **self._settings(),
            "optimizers": [slow.persistence.counters() for slow in self.slow_weights],
            "aliases": self._aliases,
        }
        return state if self.monitor is None else {**state, "monitor": self.monitor.state_dict()}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"][self.state_key]
        if not self._serves(trainer.optimizers):  # the weights are of another fit
            state["optimizers"] = []
            return
        if self.others_loaded:
            warnings.warn(f"Lookahead: this checkpoint has one set of weights only: {OTHERS_LOADED}", stacklevel=2)
            state["optimizers"] = []
            return
        folder = writes_folders(trainer.strategy)
        with self._recalibration.undone():
            states = [slow.persistence.state_dict(whole=not folder, lean=True) for slow in self.slow_weights]
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
        if self._in_batch or any(slow.sharded for slow in self.slow_weights):
            return
        self._shown = [slow for slow in self.slow_weights if slow.counting and slow.active != self.eval_weights]
        live = {place(value): p for slow in self._shown for p, value in slow.values(self.eval_weights).items()}
        for slow in self._shown:
            slow.swap_to(self.eval_weights)
        for name, value in state_dict.items():
            parameter = live.get(place(value)) if isinstance(value, torch.Tensor) else None
            if parameter is not None:
                self._replaced.append((state_dict, name, value))
                state_dict[name] = parameter.detach()

    def _end_showing(self) -> None:
        shown, self._shown = self._shown, []
        for slow in shown:
            slow.swap_to(OTHER[self.eval_weights])
        for state_dict, name, value in self._replaced:
            state_dict[name] = value
        self._replaced = []

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
            return
        check_saved(saved)
        warn_of_differences(saved, self._settings())
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
        if not self.slow_weights:
            return
        if self._restored and len(self._restored) != len(self.slow_weights):
            message = (
                f"The checkpoint was made with {len(self._restored)} optimizers, and configure_optimizers gives"
                f" {len(self.slow_weights)}: resume with the same optimizers."
            )
            raise ValueError(message)
        for slow, state in zip(self.slow_weights, self._restored, strict=False):
            slow.persistence.load_state_dict(state, self._restored_model)  # whose settings are those of the callback
        self._restored, self._restored_model = [], {}
