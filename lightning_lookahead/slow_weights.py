"""The outer loop of Lookahead around one torch optimizer. Imports torch and nothing of Lightning."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lightning_lookahead._carried import OTHER, Carried, Weights, adopt, fits, pack, unpack
from lightning_lookahead._checks import (
    check_alpha,
    check_counters,
    check_k,
    check_materialized,
    check_optimizer,
    check_weights,
    warn_of_differences,
)
from lightning_lookahead._inner_steps import InnerSteps, is_rehearsal
from lightning_lookahead._sharding import is_sharded, reshard
from lightning_lookahead._tensors import checksum, copies, copy_, distance, exchange_, interpolate_
from lightning_lookahead._tracked import Tracked, parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer


class SlowWeights:
    """The outer loop of Lookahead around one optimizer: one slow tensor per trained parameter.

    Every ``k`` inner steps the slow weights go part of the way to the fast ones, and the fast ones are put there::

        phi   <- phi + alpha * (theta - phi)
        theta <- phi

    The second line copies and never recomputes, so both are equal bit for bit after a sync, in every dtype. phi starts
    from the weights before the first step. An inner step is one that moved weights: a call of ``optimizer.step()``
    that a gradient scaler skipped, or before which no parameter had a gradient, does not count.

    The set of weights that the parameters do not hold travels in ``optimizer.state_dict()``. To resume, save the
    model, the optimizer and this object, build the three anew and load each one's ``state_dict``, in any order.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer`. Its parameters must be where they will be trained
            (device, shard). Parameters that need no gradient are left alone, until they do; added ones join.
        k: Inner steps from one sync to the next; at least 1.
        alpha: Slow weights step size, the fraction of the way to go, in (0, 1]. 1 leaves the inner optimizer as it is.
        module: The module that the parameters belong to, as FSDP or a `Fabric` returned it. Needed if they are sharded.
        sync_in_step: Sync by itself at the end of the k-th ``optimizer.step()``; ``False`` leaves it to the caller,
            who calls `sync` when `due`.
        model_weights: The weights that the model's own ``state_dict`` holds in checkpoints; ``optimizer.state_dict()``
            carries the others. ``None``: those that the parameters hold when it is called.
        measure_distance: Keep the Euclidean distance between theta and phi just before each sync in `last_distance`,
            a 0-dim tensor on the parameters' device.

    Raises:
        TypeError: If ``optimizer`` is not a torch optimizer.
        ValueError: If ``k`` or ``alpha`` is out of range, the optimizer trains no parameter, has parameters without
            values, has slow weights already, or is itself a Lookahead wrapper.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> slow = SlowWeights(optimizer, k=2, alpha=0.5)
        >>> for _ in range(2):  # two steps down the slope of w**2: 1 -> 0.5 -> 0.25, then half the way back
        ...     optimizer.zero_grad()
        ...     (weight**2).sum().backward()
        ...     loss = optimizer.step()
        >>> weight.item(), slow.syncs
        (0.625, 1)

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        *,
        module: nn.Module | None = None,
        sync_in_step: bool = True,
        model_weights: Weights | None = None,
        measure_distance: bool = False,
    ) -> None:
        check_optimizer(optimizer)
        if model_weights is not None:
            check_weights(model_weights, "model_weights")
        if any(isinstance(getattr(hook, "__self__", None), SlowWeights) for hook in _state_hooks_of(optimizer)):
            message = "optimizer has slow weights already, which would pull back twice: close() those first."
            raise ValueError(message)
        check_materialized(parameters_of(optimizer))
        sharded = is_sharded(module, parameters_of(optimizer))
        if sharded and module is None:
            message = "optimizer has sharded parameters: give the module that they belong to, too, as module=."
            raise ValueError(message)
        self.k = check_k(k)
        self.alpha = check_alpha(alpha)
        self.syncs = 0
        """Syncs done so far."""
        self.holds: Weights = "fast"
        """Which weights the parameters hold now; the other set is kept here."""
        self.last_distance: Tensor | None = None
        """How far theta and phi were apart just before the last sync, over all trained parameters; if measured."""
        self._measure_distance = measure_distance
        self.optimizer = optimizer
        self._sharded = module if sharded else None  # the module whose shards these are
        self._sync_in_step = sync_in_step
        self._model_weights = model_weights
        self._inner_steps = InnerSteps()
        self._started = False  # until the first step phi follows the parameters
        self._restored: Carried | None = None  # loaded with the optimizer's state, not yet put in place
        self._checksums: list[int] = []  # of the parameters beside which those were saved, in the optimizer's order
        self._expected: Literal["own", "slow", "fast", "nothing"] = "own"  # what a `state_dict` carries
        self._start_over = False  # whatever the optimizer's state carries is out of date
        self._tracked = Tracked(optimizer)  # with the values of the set that the parameters do not hold
        if not self._tracked.kept:
            message = "optimizer trains no parameter: none of its parameters has requires_grad=True."
            raise ValueError(message)
        self._step_hooks: list[Any] = []
        self._state_hooks: list[Any] = []
        self._hook()

    def __repr__(self) -> str:
        return f"SlowWeights({type(self.optimizer).__name__}, k={self.k}, alpha={self.alpha}, syncs={self.syncs})"

    # -- counting

    @property
    def steps(self) -> int:
        """Inner steps taken so far. May read one number from the device if a fused optimizer and a scaler are used."""
        return self._inner_steps.total

    @property
    def steps_since_sync(self) -> int:
        """Inner steps taken since the last sync; reads as `steps` does."""
        return self._inner_steps.since_sync

    @property
    def sharded(self) -> bool:
        """Whether the parameters are spread over ranks; each then keeps its own piece of both sets."""
        return self._sharded is not None

    @property
    def due(self) -> bool:
        """Whether ``k`` inner steps were taken since the last sync; reads the device only if it may be."""
        return self._inner_steps.reached(self.k)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if is_rehearsal(optimizer):
            return
        if self.holds == "slow":
            message = (
                "optimizer.step() was called while the parameters hold the slow weights: step after the"
                " `with ...use('slow')` block (or the validation) is left."
            )
            raise RuntimeError(message)
        self._settle()
        self._tracked.update_if_more()
        self._started = True
        self._inner_steps.begin()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        counted = self._inner_steps.end(optimizer, self._tracked.stepped)
        if counted and self._sync_in_step and self.due:
            self.sync()

    # -- the outer step

    def sync(self) -> None:
        """Do the outer step now: ``phi <- phi + alpha * (theta - phi)``, then ``theta <- phi``; starts a new cycle.

        A parameter that was frozen since keeps its value, and phi takes it.
        """
        if self.holds == "slow":
            message = "sync() was called while the parameters hold the slow weights: leave use('slow') first."
            raise RuntimeError(message)
        self._settle()
        self._tracked.update_if_other()
        trained = {fast: slow for fast, slow in self._tracked.kept.items() if fast.requires_grad}
        fast, slow = list(trained), list(trained.values())
        if self._measure_distance:
            self.last_distance = distance(fast, slow)
        interpolate_(slow, fast, self.alpha)
        copy_(fast, slow)
        if len(trained) < len(self._tracked.kept):
            frozen = [parameter for parameter in self._tracked.kept if not parameter.requires_grad]
            copy_([self._tracked.kept[parameter] for parameter in frozen], frozen)
        self._inner_steps.restart_cycle()
        self.syncs += 1

    # -- either set of weights

    def put(self, weights: Weights) -> None:
        """Let the parameters hold ``weights`` from now on, in place: `data_ptr` and `Parameter` stay."""
        check_weights(weights)
        self._settle()
        if self._sharded is not None:
            reshard(self._sharded)
        # After a fit Lightning moves the module to the CPU; what is kept here follows.
        self._tracked.follow()
        if weights != self.holds:
            exchange_(self._tracked.kept, self._tracked.kept.values())
            self.holds = weights

    @contextmanager
    def use(self, weights: Weights) -> Iterator[None]:
        """Let the parameters hold ``weights`` inside the ``with`` block, and what they held before after it."""
        before = self.holds
        self.put(weights)
        try:
            yield
        finally:
            self.put(before)

    def values(self, weights: Weights) -> dict[Tensor, Tensor]:
        """Each trained parameter and its value in ``weights``: live tensors, not copies."""
        check_weights(weights)
        self._settle()
        return (
            {parameter: parameter for parameter in self._tracked.kept}
            if weights == self.holds
            else dict(self._tracked.kept)
        )

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and checksums, no tensors: the weights travel with the model and the optimizer."""
        return {
            "k": self.k,
            "alpha": self.alpha,
            "steps": self.steps,
            "steps_since_sync": self.steps_since_sync,
            "syncs": self.syncs,
            "checksums": self._checksums_now(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters; ``k`` and ``alpha`` stay as they were given to this object, with a warning if they differ.

        Raises:
            ValueError: If a counter is missing or not a natural number; nothing is changed then.
        """
        check_counters(state_dict)
        warn_of_differences(state_dict, {"k": self.k, "alpha": self.alpha})
        self._inner_steps.restore(state_dict["steps"], state_dict["steps_since_sync"])
        self.syncs = state_dict["syncs"]
        self._checksums = list(state_dict.get("checksums", []))
        self._start_over = False

    def start_over(self) -> None:
        """Let both sets start from the weights that are loaded now, whatever the optimizer's state carries."""
        self._start_over = True

    def _checksums_now(self) -> list[int]:
        if self._sharded is not None:
            return []
        saved = self.values(self._model_weights or self.holds)
        return [checksum(saved.get(parameter, parameter)) for parameter in parameters_of(self.optimizer)]

    @contextmanager
    def expecting(self, weights: Weights | None) -> Iterator[None]:
        """Let the optimizer's ``state_dict`` carry ``weights`` or nothing inside the ``with`` block.

        ``torch.distributed.checkpoint`` reads into a ``state_dict`` of the optimizer that it is about to load: what it
        has there must be in the file.
        """
        self._expected = weights or "nothing"
        try:
            yield
        finally:
            self._expected = "own"

    def _pack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._expected == "nothing":
            return state_dict
        weights = OTHER[self._model_weights or self.holds] if self._expected == "own" else self._expected
        carried, rest = self.values(weights), self.values(OTHER[weights])
        if self._sharded is None:
            # Right after a sync there is nothing to carry. Nor is there for a parameter that never stepped: Adam,
            # without us, would take our entry for its own state.
            carried = {parameter: value for parameter, value in carried.items() if not value.equal(rest[parameter])}
        return pack(state_dict, optimizer, Carried(weights, dict(zip(carried, copies(carried.values()), strict=True))))

    def _unpack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not fits(state_dict, optimizer):
            return state_dict
        self._tracked.update_if_more()
        plain, carried = unpack(state_dict, optimizer)
        # The model may be loaded before or after the optimizer: wait for the first use.
        self._restored = carried
        self._started = False
        self.holds = "fast"
        return plain

    # -- which parameters

    def _settle(self) -> None:
        """Make both sets what they have to be before anything looks at them or moves them."""
        if self._started or self.holds == "slow":
            return
        if self._sharded is not None:
            reshard(self._sharded)
        restored, self._restored = self._restored or adopt(self.optimizer), None
        checksums, self._checksums = self._checksums, []
        if restored is not None:
            self._tracked.update(restored.values)  # also what is frozen now: it was trained when it was saved
        copy_(self._tracked.kept.values(), self._tracked.kept)
        if restored is None or self._start_over:
            return
        self._started = True
        others = self._matching(restored.values, checksums)
        if len(others) < len(restored.values):
            message = (
                f"Lookahead: {len(restored.values) - len(others)} of {len(restored.values)} parameters do not have the"
                f" values that their {restored.weights} weights in the checkpoint were saved with (changed while"
                " loading?). Those are left out: fast and slow weights both start from the values loaded."
            )
            warnings.warn(message, stacklevel=2)
        copy_(others if restored.weights == "fast" else [self._tracked.kept[p] for p in others], others.values())

    def _matching(self, others: dict[Tensor, Tensor], checksums: list[int]) -> dict[Tensor, Tensor]:
        """Those of the restored values whose parameters are as they were when the two were saved together.

        They are not if ``LightningModule.on_load_checkpoint`` has changed them. Of sharded weights it is not known.
        """
        listed = parameters_of(self.optimizer)
        if self._sharded is not None or len(listed) != len(checksums):
            return others
        saved = dict(zip(listed, checksums, strict=True))
        return {parameter: other for parameter, other in others.items() if checksum(parameter) == saved[parameter]}

    # -- hooks

    @property
    def counting(self) -> bool:
        """Whether steps are counted and synced: from the start until `stop`."""
        return bool(self._step_hooks)

    def stop(self) -> None:
        """Stop counting and syncing: training is over. Both sets of weights stay, also in checkpoints."""
        _remove(self._step_hooks)

    def close(self) -> None:
        """Let go of the optimizer altogether; its ``state_dict`` no longer carries a second set."""
        self.stop()
        _remove(self._state_hooks)

    def _hook(self) -> None:
        optimizer = self.optimizer
        self._step_hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._state_hooks = [
            optimizer.register_state_dict_post_hook(self._pack),
            optimizer.register_load_state_dict_pre_hook(self._unpack),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer leaves its hooks behind when it is copied or pickled, and so does this object.
        return {**self.__dict__, "_step_hooks": len(self._step_hooks), "_state_hooks": len(self._state_hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        counting, saving = state["_step_hooks"], state["_state_hooks"]
        self.__dict__.update(state)
        self._hook()
        if not counting:
            _remove(self._step_hooks)
        if not saving:
            _remove(self._state_hooks)


def _state_hooks_of(optimizer: Optimizer) -> list[Any]:
    return list(optimizer._optimizer_state_dict_post_hooks.values())


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
