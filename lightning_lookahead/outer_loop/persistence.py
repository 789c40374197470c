"""One outer loop into a state dict and out of it. The keys are in `saved_format`."""

from __future__ import annotations

import copy
import warnings
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import saved_format
from .names import names_in
from .saved_format import OTHER, Weights, joined, slow_dtype, without_words, word_key, words
from .settings import dtype_of
from .sharding import named_shards, pieces
from .tensors import checksum, copies, copy_, equal, local

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from .batch_norm import SlowStatistics
    from .cycles import Cycles
    from .momentum import Momentum
    from .parameters import Parameters
    from .settings import Settings
    from .weight_pairs import WeightPairs


Entries = dict[str, dict["Tensor", "Tensor"]]
"""Name of an entry -> parameter -> value."""


@dataclass
class Pending:
    """What was loaded and waits: the model, which it belongs to, may be loaded after it.

    Attributes:
        begun: Whether the run that was saved had taken a step with two sets of weights.
        weights: Set -> parameter -> value.
        momentum: Name of the optimizer's entry -> parameter -> value.
        statistics: Set -> BatchNorm statistics, in the module's order.
        checksums: Of the values that the model was saved with, for the parameters where that is known.
        loaded: Parameter -> what the model's ``state_dict`` had for it, where the parameter itself has rounded that.
        changed: Parameters whose values in the model's ``state_dict`` were changed after they were read.
        trained: Parameters that had a counterpart: right after a sync there is no value for them here.
        idle: Parameters without a gradient since the last sync; ``None``: all of them.
        placed: Whether it was put in its place once.
        left_out: Parameters that it was not put in place for.
    """

    begun: bool
    weights: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)
    momentum: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)
    statistics: dict[str, list[Tensor]] = field(default_factory=dict)
    checksums: dict[Tensor, int] | None = None
    loaded: dict[Tensor, Tensor] = field(default_factory=dict)
    changed: set[Tensor] = field(default_factory=set)
    trained: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] | None = field(default_factory=list)
    placed: bool = False
    left_out: set[Tensor] = field(default_factory=set)

    @property
    def in_place(self) -> bool:
        """Whether the parameters hold the fast weights that are here, or were never to hold others."""
        fast = self.weights.get("fast", {})
        return all(equal(p, value.to(p)) for p, value in fast.items() if p not in self.left_out)

    @property
    def parameters(self) -> dict[Tensor, None]:
        """Those that have a value here, in order."""
        return dict.fromkeys(parameter for values in self.weights.values() for parameter in values)

    @property
    def fits(self) -> bool:
        """Whether the parameters hold the values that they were saved with: whether the model has been loaded."""
        return self.checksums is not None and bool(self.parameters) and not self.unlike()

    def unlike(self) -> set[Tensor]:
        """Those of the parameters that do not hold the values that they were saved with."""
        known = self.checksums or {}
        return self.changed | {p for p in self.parameters if p in known and checksum(p) != known[p]}


@dataclass(eq=False)
class Persistence:
    """Saves and restores one outer loop: the set of weights that the model's own ``state_dict`` lacks, and the counts.

    Args:
        settings: What the outer loop was told.
        parameters: What the parameters are called, and whether they are sharded.
        pairs: The two sets of weights.
        cycles: The counts.
        momentum: The inner momentum after the last sync.
        statistics: Slow BatchNorm statistics.
        model_weights: The set that the model's own ``state_dict`` holds; ``None``: that which the parameters hold.

    Attributes:
        pending: What was loaded and waits: the model may be loaded after it.
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
        """Settings and counts: the state without a tensor."""
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
        """Right after a sync, let both sets have what was written into the parameters from outside since."""
        self.place()
        if self.pairs.active == "fast" and not self.cycles.begun():
            self.pairs.adopt()

    def state_dict(self, *, whole: bool, lean: bool = False) -> dict[str, Any]:
        """The state of the outer loop, as `lightning_lookahead.outer_loop.saved_format` says; copies.

        Args:
            whole: Of sharded weights, gather whole tensors on the first rank; by default each rank has its shards.
            lean: Leave out what the model's own ``state_dict`` gives, if it is one file: right after a sync that is all
                of it.
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
        sharded = self.parameters.sharded
        tensors = self._shards(weights, momentum, whole=whole) if sharded else self._named(weights, momentum)
        state = {**self.counters(), **tensors}
        if self.statistics.names:
            other = OTHER[self.saved_with]
            values = self.statistics.live if other == self.pairs.active else self.statistics.kept
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

    def _named(self, weights: Entries, momentum: Entries) -> dict[str, Any]:
        names, beside = self.parameters.names(), self.pairs.values(self.saved_with)
        named = {
            part: {
                entry: dict(zip(map(names.__getitem__, values), copies(values.values()), strict=True))
                for entry, values in entries.items()
            }
            for part, entries in (("weights", weights), ("momentum", momentum))
        }
        sums = {which: {n: checksum(value) for n, value in own.items()} for which, own in named["weights"].items()}
        sums[self.saved_with] = {name: checksum(beside.get(p, p).to(p.dtype)) for p, name in names.items()}
        return {**named, "checksums": sums}

    def _shards(self, weights: Entries, momentum: Entries, *, whole: bool) -> dict[str, Any]:
        entries = {"weights": weights, "momentum": momentum}
        return {**{part: self._cut(own, whole=whole) for part, own in entries.items()}, "checksums": {}}

    def _cut(self, entries: Entries, *, whole: bool) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for entry, values in entries.items():
            cut = {p: words(local([value])[0], p.dtype) for p, value in values.items()}
            for index, level in enumerate(_levels(cut)):
                found[word_key(entry, index)] = named_shards(self._module, level, whole=whole)
        if not whole:
            return found
        dtypes = {name: slow_dtype(word.dtype, self.pairs.dtype) for name, word in found.get("slow", {}).items()}
        return without_words(found, dtypes)

    @property
    def _module(self) -> nn.Module:
        assert self.parameters.module is not None  # noqa: S101 (there is one where the weights are sharded)
        return self.parameters.module

    # -- loading

    def load_state_dict(self, state: dict[str, Any], model: Mapping[str, Any] | None = None) -> None:
        """Take the counts; what is tensors becomes `pending`, and takes its place if the model is there.

        Args:
            state: What `state_dict` returned.
            model: The model's ``state_dict`` that was saved with it and has been loaded, if it is at hand.

        Raises:
            ValueError: If the state is damaged or of another model; nothing is changed then.
        """
        saved_format.check_state(state)
        pending = self._by_piece(state) if self.parameters.sharded else self._by_parameter(state)
        pending.statistics = self._saved_statistics(state.get("statistics", {}))
        self.pairs.track_new()
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
        """Whether something was loaded that waits for the model to be loaded, too, and now can take its place."""
        return self.pending is not None and self.pending.fits

    def when_loaded(self) -> None:
        """Put what waits for the model in its place: the model was loaded just now, its statistics, too."""
        if self.pending is not None:
            self.pending.placed = False
        if self.waits:
            self.place()

    def _of_names(self, listed: Collection[str]) -> list[Tensor]:
        wanted = set(listed)
        return [parameter for parameter, name in self.parameters.names().items() if name in wanted]

    def _compare(self, pending: Pending, model: Mapping[str, Any]) -> None:
        """Note what the model's ``state_dict``, which has been read with the pending state, has for each parameter.

        That tells what was changed after it was read also where the module rounds or converts what it loads.
        """
        moved = pending.parameters
        for parameter, name in self.parameters.names().items():
            value = model.get(name)
            if isinstance(value, torch.Tensor) and pending.checksums and parameter in pending.checksums:
                saved = pending.checksums.pop(parameter)
                if parameter in moved and checksum(value) != saved:
                    pending.changed.add(parameter)
                if value.shape == parameter.shape and _was_rounded(value, parameter):
                    pending.loaded[parameter] = value

    def _by_parameter(self, state: dict[str, Any]) -> Pending:
        parameters = {name: parameter for parameter, name in self.parameters.names().items()}
        pending = Pending(state["steps"] > self.settings.start_step)
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
        return pending

    def _by_piece(self, state: dict[str, Any]) -> Pending:
        chosen = dtype_of(state.get("slow_dtype"))
        pending = Pending(state["steps"] > self.settings.start_step)
        for entry, levels in _by_level(state.get("weights", {})):
            dtypes = {p: slow_dtype(p.dtype, chosen) if entry == "slow" else p.dtype for p in self._pieces_in(levels)}
            base = {p: local([p])[0].to(dtype) for p, dtype in dtypes.items()}
            pending.weights[entry] = self._pieces(levels, base)
        for entry, levels in _by_level(state.get("momentum", {})):
            zeros = {p: torch.zeros_like(local([p])[0]) for p in self._pieces_in(levels)}
            base = {p: zero.to(slow_dtype(p.dtype, None)) if len(levels) > 1 else zero for p, zero in zeros.items()}
            pending.momentum[entry] = self._pieces(levels, base)
        return pending

    def _pieces_in(self, levels: list[Mapping[str, Any]]) -> list[Tensor]:
        """The parameters that an entry has a value for; a flat parameter of FSDP1 is several."""
        names = names_in(self._module)
        return [
            p
            for p in self.parameters.listed
            if getattr(p, "_is_flat_param", False) or not set(names.get(p, [])).isdisjoint(levels[0])
        ]

    def _pieces(self, levels: Sequence[Mapping[str, Any]], base: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What this rank has: of whole tensors, of shards, or of shards that were cut into words."""
        whole = not any(_is_shard(value) for level in levels for value in level.values())
        if whole:
            names = names_in(self._module)
            own = {name: (p.dtype, base[p].dtype) for p in base for name in names.get(p, [])}
            cut = {
                name: words(value.to(own[name][1]), own[name][0]) for name, value in levels[0].items() if name in own
            }
            levels = _levels(cut)
        based = {p: words(value, p.dtype) for p, value in base.items()}
        found: dict[Tensor, list[Tensor]] = {p: [] for p in base}
        for index, level in enumerate(_levels(based)):
            named = levels[index] if index < len(levels) else {}
            for p, piece in zip(level, pieces(self._module, level, named, whole=whole), strict=True):
                found[p].append(piece)
        return {p: joined(parts, base[p].dtype) for p, parts in found.items()}

    def _saved_statistics(self, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        names = self.statistics.names
        return {
            which: [values[name] for name in names]
            for which, values in saved.items()
            if names and all(name in values for name in names)
        }

    # -- into place

    def place(self) -> None:
        """Make both sets what they have to be before anything looks at them or moves them.

        What was loaded takes its place, again if the model was loaded since. It stays pending until training goes on.
        Until training has begun phi is where the parameters are.
        """
        pending = self.pending
        if self.pairs.active == "slow" or (self.pairs.begun and pending is None):
            return
        self.parameters.reshard()
        if pending is not None and not (pending.placed and pending.in_place):
            self._put(pending)
        if pending is None or not pending.begun:
            self.pairs.track_replaced()
            self.pairs.start()
            self.statistics.start()

    def let_go(self, *, begins: bool = False) -> None:
        """Say that all is loaded: from here on the weights are moved.

        Args:
            begins: Whether the first cycle begins.
        """
        pending, self.pending = self.pending, None
        self.pairs.begun = self.pairs.begun or begins or (pending is not None and pending.begun)

    def begin(self) -> None:
        """Say that all is loaded: what moves the parameters from here on is training, also another optimizer's."""
        self.place()
        self.let_go()

    def _put(self, pending: Pending) -> None:
        pending.placed = True
        copy_(pending.loaded, pending.loaded.values())
        # Also what is frozen now: it was trained when it was saved.
        self.pairs.track({*pending.parameters, *pending.trained})
        self.cycles.update(self.pairs.counterparts)
        self.pairs.start()
        self.pairs.begun = pending.begun
        kept = self.pairs.counterparts
        if pending.idle is not None:
            self.pairs.idle = dict.fromkeys(p for p in pending.idle if p in kept)
        self.momentum.restore(pending.momentum)
        pending.left_out = changed = pending.unlike()
        if changed:
            message = (
                f"Lookahead: {len(changed)} of {len(pending.parameters)} parameters do not have the values that the"
                " weights in the checkpoint were saved with (changed while loading?). Those are left out: fast and slow"
                " weights both start from the values loaded."
            )
            warnings.warn(message, stacklevel=2)
        places = {"fast": {p: p for p in kept}, "slow": kept}
        for which, values in pending.weights.items():
            own = [p for p in values if p in kept and p not in changed]
            if which == "fast" or pending.begun:  # before that phi is theta
                copy_([places[which][p] for p in own], [values[p] for p in own])
        self.statistics.start()
        for which, statistics in pending.statistics.items() if pending.begun else ():
            copy_(self.statistics.live if which == "fast" else self.statistics.kept, statistics)


class Shards(dict[str, Any]):
    """The state of sharded weights. One rank's shards, pickled alone, would be a file that nothing can go on from."""

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        message = (
            "SlowWeights.state_dict() holds this rank's shards, for torch.distributed.checkpoint: to pickle, as"
            " Fabric.save does on one rank, give it SlowWeights.state_dict(whole=True)."
        )
        raise TypeError(message)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        return Shards({key: copy.deepcopy(value, memo) for key, value in self.items()})


class WhenLoaded:
    """Tells a `Persistence` that its module was loaded; nothing, where module or hook have been copied or pickled."""

    def __init__(self, persistence: Persistence | None = None) -> None:
        self._persistence = weakref.ref(persistence) if persistence is not None else None

    def __call__(self, *_: object) -> None:
        """Put what waits in its place."""
        persistence = self._persistence() if self._persistence is not None else None
        if persistence is not None:
            persistence.when_loaded()

    def __reduce__(self) -> tuple[Any, ...]:
        return WhenLoaded, ()


def _agree(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors, of two types perhaps, have the same values: neither is rounded for it."""
    common = torch.promote_types(value.dtype, other.dtype)
    return torch.equal(value.to(common), other.to(value.device, common))


def _was_rounded(value: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter has a value as a module of lower precision, which was converted later, has loaded it."""
    if not value.is_floating_point() or torch.equal(value.to(parameter), parameter):
        return False
    narrow = (value.to(dtype).to(parameter) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    return any(torch.equal(rounded, parameter) for rounded in narrow)


def _is_shard(value: object) -> bool:
    return hasattr(value, "local_shards") or hasattr(value, "to_local")


def _by_level(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Each entry with its words, the first of all tensors, then the second of those that have one, and so on."""
    for entry in [key for key in entries if "." not in key]:
        levels = [entries[entry]]
        while word_key(entry, len(levels)) in entries:
            levels.append(entries[word_key(entry, len(levels))])
        yield entry, levels


def _levels(cut: Mapping[Any, list[Tensor]]) -> list[dict[Any, Tensor]]:
    """The first word of each, the second of those that have one, and so on."""
    longest = max(map(len, cut.values()), default=0)
    return [{key: parts[index] for key, parts in cut.items() if len(parts) > index} for index in range(longest)]
