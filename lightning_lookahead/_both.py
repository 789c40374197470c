"""The half of `SlowWeights` that holds both sets of weights, swaps, saves and restores them. Imports torch alone."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead._carried import OTHER, Carried, Weights, adopt, fits, keep_groups, pack, unpack
from lightning_lookahead._checks import check_counters, check_weights, warn_of_differences
from lightning_lookahead._inner_steps import InnerSteps
from lightning_lookahead._sharding import reshard
from lightning_lookahead._tensors import checksum, copies, copy_
from lightning_lookahead._tracked import Tracked, parameters_of
from lightning_lookahead.step_size import Length, StepSize, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_lookahead._buffers import SlowBuffers
    from lightning_lookahead._cycles import Cycle, Cycles
    from lightning_lookahead.momentum import Momentum


class BothWeights:
    """The fast and the slow weights of one optimizer, of which the parameters hold one set.

    Args:
        optimizer: The optimizer.
        k: As it was given, to compare with what was saved.
        alpha: The same.
        tracked: The parameters with their second tensors.
        cycles: The counts to save, beside those of inner steps.
        momentum: What else to save.
        buffers: The same.
        sharded: The module whose shards the parameters are, if they are.
        model_weights: The set that the model's own ``state_dict`` holds; ``None``: that which the parameters hold.
        start_step: Inner steps before which there is one set only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: Length,
        alpha: StepSize,
        *,
        tracked: Tracked,
        cycles: Cycles,
        momentum: Momentum,
        buffers: SlowBuffers | None,
        sharded: nn.Module | None,
        model_weights: Weights | None,
        start_step: int,
    ) -> None:
        self.optimizer = optimizer
        self.k = k
        self.alpha = alpha
        self.buffers = buffers
        """Slow BatchNorm statistics, if there are any."""
        self._tracked = tracked
        self._cycles = cycles
        self._momentum = momentum
        self._sharded = sharded
        self._model_weights = model_weights
        self._start_step = start_step
        self._inner_steps = InnerSteps()
        self._started = False  # until the first step phi follows the parameters
        self._restored: Carried | None = None  # loaded with the optimizer's state, not yet put in place
        self._restored_buffers: dict[str, Any] = {}
        self._checksums: list[int] = []  # of the parameters beside which those were saved, in the optimizer's order
        self._expected: Collection[str] | None = None  # what a `state_dict` has to carry
        self._begun = False  # whether the run whose counters were loaded last had taken a step with both
        self._looked = False  # whether what was loaded last, if anything, has been put in place
        self._start_over = False  # whatever the optimizer's state carries is out of date

    @property
    def holds(self) -> Weights:
        """Which weights the parameters hold now; the other set is kept here."""
        return self._tracked.holds

    @property
    def sharded(self) -> bool:
        """Whether the parameters are spread over ranks; each then keeps its own piece of both sets."""
        return self._sharded is not None

    @property
    def steps(self) -> int:
        """Inner steps taken so far. May read one number from the device if a fused optimizer and a scaler are used."""
        return self._inner_steps.total

    def _since(self, cycle: Cycle) -> int:
        return max(self.steps - cycle.begins, 0)

    # -- either set

    def put(self, weights: Weights) -> None:
        """Let the parameters hold ``weights`` from now on, in place: `data_ptr` and `Parameter` stay."""
        check_weights(weights)
        self._settle()
        if self._sharded is not None:
            reshard(self._sharded)
        # After a fit Lightning moves the module to the CPU; what is kept here follows.
        self._tracked.follow()
        other = weights != self.holds
        self._tracked.put(weights, synced=not any(self._since(cycle) for cycle in self._cycles))
        if self.buffers is not None and other:
            self.buffers.exchange()

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
        """Each trained parameter and its value in ``weights``: live tensors, not copies.

        Slow weights of low precision parameters are of ``slow_dtype``, also while the parameters hold them, rounded.
        """
        check_weights(weights)
        self._settle()
        return self._tracked.values(weights)

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and checksums: the weights travel with the model and the optimizer.

        No tensors, but for the other set of BatchNorm statistics with ``buffers="sync"``.
        """
        first, *others = [{"steps_since_sync": self._since(cycle), "syncs": cycle.syncs} for cycle in self._cycles]
        return {
            "k": describe(self.k),
            "alpha": describe(self.alpha),
            "steps": self.steps,
            **first,
            **({"groups": others} if others else {}),
            **({} if self.buffers is None else {"statistics": self._carried_buffers(self.buffers)}),
            "checksums": self._checksums_now(),
        }

    def _carried_buffers(self, buffers: SlowBuffers) -> dict[str, Any]:
        other = OTHER[self._model_weights or self.holds]
        self._settle()
        return {other: copies(buffers.live if other == self.holds else buffers.kept)}

    def _checksums_now(self) -> list[int]:
        if self._sharded is not None:
            return []
        saved = self.values(self._model_weights or self.holds)
        return [checksum(saved.get(p, p).to(p.dtype)) for p in parameters_of(self.optimizer)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counters; ``k`` and ``alpha`` stay as they were given to this object, with a warning if they differ.

        Raises:
            ValueError: If a counter is missing or not a natural number; nothing is changed then.
        """
        check_counters(state_dict)
        warn_of_differences(state_dict, {"k": describe(self.k), "alpha": describe(self.alpha)})
        self._inner_steps.restore(state_dict["steps"])
        self._begun = state_dict["steps"] > self._start_step
        self._tracked.update_if_more()
        self._cycles.update(max(self.steps, self._start_step))
        for cycle, saved in zip(self._cycles, [state_dict, *state_dict.get("groups", [])], strict=False):
            cycle.begins = max(state_dict["steps"] - saved["steps_since_sync"], self._start_step)
            cycle.syncs = saved["syncs"]
        self._checksums = list(state_dict.get("checksums", []))
        self._restored_buffers = state_dict.get("statistics", {})
        self._start_over = False

    def start_over(self) -> None:
        """Let both sets start from the weights that are loaded now, whatever the optimizer's state carries."""
        self._start_over = True

    @contextmanager
    def expecting(self, names: Collection[str]) -> Iterator[None]:
        """Let the optimizer's ``state_dict`` carry entries of these names inside the ``with`` block.

        ``torch.distributed.checkpoint`` reads into a ``state_dict`` of the optimizer that it is about to load: what it
        has there must be in the file.
        """
        self._expected = names
        try:
            yield
        finally:
            self._expected = None

    def _pack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        names = ["slow", "fast", *self._momentum.previous] if self._expected is None else self._expected
        entries = {name: self._carry(name) for name in names}
        return pack(
            state_dict,
            optimizer,
            Carried({name: dict(zip(own, copies(own.values()), strict=True)) for name, own in entries.items()}),
        )

    def _carry(self, name: str) -> dict[Tensor, Tensor]:
        """What an entry holds: a set of weights, or the momentum after the last sync."""
        weights = next((weights for weights in OTHER if weights == name), None)
        if weights is None:
            previous = self._momentum.previous.get(name, {})
            if self._sharded is None:
                return previous
            return {p: previous.get(p, torch.zeros_like(p)) for p in self._tracked.kept}
        own, model_weights = self.values(weights), self._model_weights or self.holds
        if self._sharded is not None:
            # The same on all ranks: the other set, and slow weights that the model cannot hold without rounding.
            whole = weights != model_weights or self._expected is not None
            return {p: value for p, value in own.items() if whole or self._tracked.is_apart(p)}
        # What the model's own state_dict gives need not be carried: right after a sync that is all of it. Nor is there
        # anything for a parameter that never stepped: Adam, without us, would take our entry for its own state.
        saved = self.values(model_weights)
        return {p: value for p, value in own.items() if not value.equal(saved[p].to(p).to(value))}

    def _unpack(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not fits(state_dict, optimizer):
            return state_dict
        self._tracked.update_if_more()
        plain, carried = unpack(keep_groups(state_dict, optimizer), optimizer)
        # The model may be loaded before or after the optimizer: wait for the first use.
        self._restored = carried
        self._started = self._looked = False
        self._tracked.end_swap()
        return plain

    # -- restoring

    def _settle(self) -> None:
        """Make both sets what they have to be before anything looks at them or moves them."""
        if self._started or self.holds == "slow":
            return
        if self._sharded is not None:
            reshard(self._sharded)
        restored, self._restored = self._restored or adopt(self.optimizer), None
        checksums, self._checksums = self._checksums, []
        looked, self._looked = self._looked, True
        entries = restored.entries if restored is not None else {}
        sets: dict[Weights, dict[Tensor, Tensor]] = {weights: entries.get(weights, {}) for weights in OTHER}
        saved = dict.fromkeys([*sets["slow"], *sets["fast"]])
        self._tracked.update(saved)  # also what is frozen now: it was trained when it was saved
        self._cycles.update(max(self.steps, self._start_step))
        self._tracked.start()
        if not looked:
            self._momentum.restore(entries)
        if self.buffers is not None:
            if not looked or self._start_step:  # later the first forward has moved them
                self.buffers.start()
            for weights, values in ({} if self._start_over else self._restored_buffers).items():
                copy_(self.buffers.live if weights == "fast" else self.buffers.kept, values)
            self._restored_buffers = {}
        self._started, self._begun = self._begun, False
        if restored is None or self._start_over:
            return
        self._started = True
        matching = self._matching(saved, checksums)
        if len(matching) < len(saved):
            message = (
                f"Lookahead: {len(saved) - len(matching)} of {len(saved)} parameters do not have the values that the"
                " weights in the checkpoint were saved with (changed while loading?). Those are left out: fast and slow"
                " weights both start from the values loaded."
            )
            warnings.warn(message, stacklevel=2)
        kept = self._tracked.kept
        for weights, values in sets.items():
            own = {parameter: value for parameter, value in values.items() if parameter in matching & kept.keys()}
            copy_([p if weights == "fast" else kept[p] for p in own], own.values())

    def _matching(self, saved: Collection[Tensor], checksums: list[int]) -> set[Tensor]:
        """Those of the parameters that are as they were when they and what was carried were saved together.

        They are not if ``LightningModule.on_load_checkpoint`` has changed them. Of sharded weights it is not known.
        """
        listed = parameters_of(self.optimizer)
        if self._sharded is not None or len(listed) != len(checksums):
            return set(saved)
        sums = dict(zip(listed, checksums, strict=True))
        return {parameter for parameter in saved if checksum(parameter) == sums[parameter]}
