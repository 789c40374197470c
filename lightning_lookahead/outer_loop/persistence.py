"""One outer loop into a state dict and out of it. The keys are in `saved_format`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import saved_format
from .pending import Pending
from .saved_format import OTHER, Weights, slow_dtype, without_words
from .settings import dtype_of
from .sharded_entries import ShardedEntries
from .tensors import as_they_are, checksums, copies, copy_

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor

    from .batch_norm import SlowStatistics
    from .cycles import Cycles
    from .momentum import Momentum
    from .parameters import Parameters
    from .settings import Settings
    from .sharded_entries import Entries
    from .weight_pairs import WeightPairs


@dataclass(eq=False)
class Persistence:
    """Saves and restores one outer loop: the set of weights that the model's own ``state_dict`` lacks, and the counts.

    Args:
        settings: The options of the outer loop.
        parameters: Names of the parameters, and whether they are sharded.
        pairs: Fast and slow weights.
        cycles: Counts of steps and syncs.
        momentum: The inner momentum after the last sync.
        statistics: Slow BatchNorm statistics.
        model_weights: The set that the model's own ``state_dict`` holds; ``None``: the set that is active.

    Attributes:
        pending: A state that was loaded and waits for its model.
    """

    settings: Settings
    parameters: Parameters
    pairs: WeightPairs
    cycles: Cycles
    momentum: Momentum
    statistics: SlowStatistics
    model_weights: Weights | None
    pending: Pending | None = None

    def __post_init__(self) -> None:
        if self.model_weights is not None:
            saved_format.check_weights(self.model_weights, "model_weights")

    @property
    def saved_with(self) -> Weights:
        """The set that the model's own ``state_dict`` holds."""
        return self.model_weights or self.pairs.active

    # -- saving

    def counters(self) -> dict[str, Any]:
        """Settings and counts: the part of the state without tensors."""
        trained, idle = self.pairs.counterparts, self.pairs.idle
        names = self.parameters.names()
        return {
            **self.settings.saved(),
            **self.cycles.counters(),
            "trained": [names[p] for p in trained],
            "idle": None if len(idle) == len(trained) else [names[p] for p in idle],
            "saved_with": self.saved_with,
        }

    def adopt(self) -> None:
        """Right after a sync, let both sets be what the parameters hold: others may have written to them."""
        self.place()
        if self.pairs.active == "fast" and not self.cycles.begun():
            self.pairs.adopt()

    def state_dict(self, *, whole: bool, lean: bool = False) -> dict[str, Any]:
        """The state of the outer loop; `lightning_lookahead.outer_loop.saved_format` documents its keys.

        Args:
            whole: Gather sharded weights on the first rank, as whole tensors; otherwise each rank has its shards.
            lean: Unless weights are sharded, leave out values that the model's own ``state_dict`` holds, too (right
                after a sync all values), and copy nothing: the state is written before training goes on.
        """
        self.adopt()
        lean = lean and not self.parameters.sharded
        weights = self._weights(lean=lean)
        momentum = {name: dict(values) for name, values in self.momentum.previous.items()}
        if not lean:
            momentum = {
                name: {p: momentum.get(name, {}).get(p, torch.zeros_like(p)) for p in self.pairs.counterparts}
                for name in self.momentum.names
            }
        momentum.update(self.pairs.outer_momentum.saved(self.pairs.counterparts, lean=lean))
        state = self.counters()
        if self.parameters.sharded:
            entries = {"weights": weights, "momentum": momentum}
            shards = ShardedEntries(self.parameters, self.settings.slow_dtype)
            state.update({part: shards.cut(own, whole=whole) for part, own in entries.items()}, checksums={})
        else:
            state.update(self._named(weights, momentum, as_they_are if lean else copies))
        if self.statistics.names:
            other = OTHER[self.saved_with]
            values = self.statistics.live if other == self.pairs.active else self.statistics.counterparts
            state["statistics"] = {other: dict(zip(self.statistics.names, copies(values), strict=True))}
        return {name: value for name, value in state.items() if value or name not in {"momentum", "weights"}}

    def _weights(self, *, lean: bool) -> Entries:
        beside = self.pairs.values(self.saved_with)
        entries: Entries = {}
        for which in OTHER:
            own = self.pairs.values(which)
            if lean:
                own = {p: value for p, value in own.items() if not _agree(value, beside[p].to(p))}
            elif which == self.saved_with:  # slow weights that the model cannot hold without rounding
                own = {p: value for p, value in own.items() if self.pairs.is_apart(p) and which == "slow"}
            if own:
                entries[which] = own
        return entries

    def _named(
        self, weights: Entries, momentum: Entries, kept: Callable[[Iterable[Tensor]], list[Tensor]]
    ) -> dict[str, Any]:
        names, beside = self.parameters.names(), self.pairs.values(self.saved_with)
        named = {
            part: {
                entry: dict(zip(map(names.__getitem__, values), kept(values.values()), strict=True))
                for entry, values in entries.items()
            }
            for part, entries in (("weights", weights), ("momentum", momentum))
        }
        summed = {which: dict(own) for which, own in named["weights"].items()}
        summed[self.saved_with] = {name: beside.get(p, p).to(p.dtype) for p, name in names.items()}
        found = iter(checksums([value for own in summed.values() for value in own.values()]))
        return {**named, "checksums": {which: {name: next(found) for name in own} for which, own in summed.items()}}

    # -- loading

    def load_state_dict(self, state: dict[str, Any], model: Mapping[str, Any] | None = None) -> None:
        """Take the counts; tensors become `pending`, and take their places if the model is loaded already.

        Args:
            state: What `state_dict` returned.
            model: The model's ``state_dict`` that was saved with ``state`` and has been loaded, if it is at hand.

        Raises:
            ValueError: If the state is damaged or of another model; nothing is changed then.
        """
        saved_format.check_state(state)
        pending = Pending(state["steps"] > self.settings.start_step)
        if self.parameters.sharded:
            shards = ShardedEntries(self.parameters, state.get("slow_dtype"))
            pending.weights.update(shards.weights(state.get("weights", {})))
            pending.momentum.update(shards.momentum(state.get("momentum", {})))
        else:
            self._take(pending, state)
        pending.statistics = self._saved_statistics(state.get("statistics", {}))
        if self.pairs.has_new:
            self.pairs.track()
        self.cycles.restore(state, self.pairs.counterparts)
        pending.trained = self._of_names(state.get("trained") or [])
        pending.idle = None if state.get("idle", []) is None else self._of_names(state.get("idle", []))
        if model is not None:
            self._compare(pending, model)
        self.pending = pending
        self.pairs.end_swap()
        if self.waits:  # the model was loaded before
            self.place()

    @property
    def waits(self) -> bool:
        """Whether a pending state can take its place: its model has been loaded."""
        return self.pending is not None and self.pending.fits

    def when_loaded(self) -> None:
        """Put a pending state in its place: the model was loaded just now."""
        if self.pending is not None:
            self.pending.placed = False
        if self.waits:
            self.place()

    def _of_names(self, listed: Collection[str]) -> list[Tensor]:
        wanted = set(listed)
        return [parameter for parameter, name in self.parameters.names().items() if name in wanted]

    def _compare(self, pending: Pending, model: Mapping[str, Any]) -> None:
        """Compare the model's ``state_dict``, read with the pending state, with the checksums.

        A parameter itself cannot be compared where the module rounds or converts what it loads.
        """
        known, moved = pending.checksums or {}, pending.parameters
        given = {p: model.get(name) for p, name in self.parameters.names().items() if p in known}
        values = {p: value for p, value in given.items() if isinstance(value, torch.Tensor)}
        asked = [p for p in values if p in moved]
        for parameter, found in zip(asked, checksums([values[p] for p in asked]), strict=True):
            if found != known[parameter]:
                pending.changed.add(parameter)
        for parameter, value in values.items():
            del known[parameter]
            if value.shape == parameter.shape and _was_rounded(value, parameter):
                pending.loaded[parameter] = value

    def _take(self, pending: Pending, state: dict[str, Any]) -> None:
        """Take the tensors of a state by parameter name, with their checksums."""
        parameters = {name: parameter for parameter, name in self.parameters.names().items()}
        chosen = dtype_of(state.get("slow_dtype"))
        dtypes = {name: slow_dtype(parameter.dtype, chosen) for name, parameter in parameters.items()}
        for part, into in (("weights", pending.weights), ("momentum", pending.momentum)):
            for entry, values in without_words(state.get(part, {}), dtypes).items():
                saved_format.check_entries(entry, values, parameters)
                into[entry] = {parameters[name]: value for name, value in values.items() if name in parameters}
        sums, beside = state.get("checksums", {}), state.get("saved_with", self.saved_with)
        saved_format.check_sums(
            {which: own for which, own in state.get("weights", {}).items() if which != beside}, sums
        )
        own = sums.get(beside, {})
        pending.checksums = {parameters[name]: value for name, value in own.items() if name in parameters}

    def _saved_statistics(self, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        names = self.statistics.names
        return {
            which: [values[name] for name in names]
            for which, values in saved.items()
            if names and all(name in values for name in names)
        }

    # -- into place

    def place(self) -> None:
        """Make both sets right before anything reads or moves them.

        A pending state takes its place, once more if the model was loaded since. It stays pending until training goes
        on. Before the first cycle phi is what the parameters hold.
        """
        pending = self.pending
        if self.pairs.active == "slow" or (self.pairs.two_sets and pending is None):
            return
        self.parameters.reshard()
        if pending is not None and not (pending.placed and pending.in_place):
            self._settle(pending)
        if pending is None or not pending.two_sets:
            self.pairs.track_replaced()
            self.cycles.update(self.pairs.counterparts)
            self.pairs.start()
            self.statistics.start()

    def let_go(self, *, begins: bool = False) -> None:
        """Drop the pending state: training moves the weights from here on.

        Args:
            begins: Whether the first cycle begins.
        """
        pending, self.pending = self.pending, None
        self.pairs.two_sets = self.pairs.two_sets or begins or (pending is not None and pending.two_sets)

    def begin(self) -> None:
        """Put a pending state in its place and drop it: training moves the weights from here on."""
        self.place()
        self.let_go()

    def _settle(self, pending: Pending) -> None:
        pending.placed = True
        copy_(pending.loaded, pending.loaded.values())
        # Parameters that are frozen now may have been trained in the saved run.
        self.pairs.track({*pending.parameters, *pending.trained})
        self.cycles.update(self.pairs.counterparts)
        self.pairs.start()
        self.pairs.two_sets = pending.two_sets
        counterparts = self.pairs.counterparts
        idle = counterparts if pending.idle is None else pending.idle
        self.pairs.idle = dict.fromkeys(p for p in idle if p in counterparts)
        self.momentum.restore(pending.momentum)
        self.pairs.outer_momentum.restore(pending.momentum, counterparts if pending.two_sets else {})
        pending.left_out = changed = pending.unlike()
        self.pairs.outer_momentum.forget(changed)
        if changed:
            message = (
                f"Lookahead: {len(changed)} of {len(pending.parameters)} parameters do not have the values that the"
                " weights in the checkpoint were saved with (changed while loading?). They are left out: their fast and"
                " slow weights both start from the values loaded."
            )
            warnings.warn(message, stacklevel=2)
        places = {"fast": {p: p for p in counterparts}, "slow": counterparts}
        for which, values in pending.weights.items():
            own = [p for p in values if p in counterparts and p not in changed]
            if which == "fast" or pending.two_sets:  # before that phi is theta
                copy_([places[which][p] for p in own], [values[p] for p in own])
        self.statistics.start()
        for which, statistics in pending.statistics.items() if pending.two_sets else ():
            copy_(self.statistics.live if which == "fast" else self.statistics.counterparts, statistics)


def _agree(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal values; their dtypes may differ, and neither is rounded."""
    if value is other:
        return True
    common = torch.promote_types(value.dtype, other.dtype)
    first = [(value[:1], other[:1])] if value.ndim else []  # in the middle of a cycle the first row tells
    return all(torch.equal(one.to(common), two.to(one.device, common)) for one, two in [*first, (value, other)])


def _was_rounded(value: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter holds ``value`` rounded: a module of lower precision loaded it and was converted later."""
    if not value.is_floating_point() or torch.equal(value.to(parameter), parameter):
        return False
    narrow = (value.to(dtype).to(parameter) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    return any(torch.equal(rounded, parameter) for rounded in narrow)
