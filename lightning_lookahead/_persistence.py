"""One outer loop into a state dict and out of it. Imports torch alone; the keys are in `_saved_format`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead._checks import check_entries, check_state, check_sums
from lightning_lookahead._names import names_in
from lightning_lookahead._saved_format import OTHER, Weights, joined, slow_dtype, without_words, word_key, words
from lightning_lookahead._settings import dtype_of
from lightning_lookahead._sharding import named_shards, pieces
from lightning_lookahead._tensors import checksum, copies, copy_, equal, local
from lightning_lookahead._tracked import parameters_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_lookahead._buffers import SlowBuffers
    from lightning_lookahead._cycles import Cycles
    from lightning_lookahead._inner_steps import InnerSteps
    from lightning_lookahead._settings import Settings
    from lightning_lookahead._tracked import Tracked
    from lightning_lookahead.momentum import Momentum


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
        trained: Parameters that had a second tensor: right after a sync there is no value for them here.
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


class Persistence:
    """Saves and restores the second set of weights of one optimizer, with the counts of its cycles.

    Args:
        optimizer: The optimizer.
        settings: What the outer loop was told.
        tracked: The parameters with their second tensors.
        cycles: The counts since the last sync.
        inner_steps: The counts since the start.
        momentum: The inner momentum after the last sync.
        buffers: Slow BatchNorm statistics, if there are any.
        module: The module that gives parameters their names; without one they go by their place in the optimizer.
        sharded: Whether the parameters are spread over ranks; ``module`` is then the one whose shards they are.
        model_weights: The set that the model's own ``state_dict`` holds; ``None``: that which the parameters hold.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: Settings,
        *,
        tracked: Tracked,
        cycles: Cycles,
        inner_steps: InnerSteps,
        momentum: Momentum,
        buffers: SlowBuffers | None,
        module: nn.Module | None,
        sharded: bool,
        model_weights: Weights | None,
    ) -> None:
        self.pending: Pending | None = None
        self._optimizer, self._settings = optimizer, settings
        self._tracked = tracked
        self._cycles = cycles
        self._inner_steps = inner_steps
        self._momentum = momentum
        self._buffers = buffers
        self._module = module
        self._sharded = sharded
        self._model_weights = model_weights

    @property
    def saved_with(self) -> Weights:
        """The set that the model's own ``state_dict`` holds."""
        return self._model_weights or self._tracked.holds

    def names(self) -> dict[Tensor, str]:
        """What each parameter of the optimizer goes by: its name in the module, or its place in the optimizer."""
        known = names_in(self._module) if self._module is not None else {}
        listed = enumerate(parameters_of(self._optimizer))
        return {parameter: known[parameter][0] if parameter in known else f"[{at}]" for at, parameter in listed}

    # -- saving

    def counters(self) -> dict[str, Any]:
        """Settings and counts: the state without a tensor."""
        first, *others = [
            {"steps_since_sync": max(self._inner_steps.total - cycle.begins, 0), "syncs": cycle.syncs}
            for cycle in self._cycles
        ]
        return {
            **self._settings.saved(),
            "steps": self._inner_steps.total,
            **first,
            **({"groups": others} if others else {}),
            "trained": self._listed(self._tracked.kept),
            "idle": None if len(self._tracked.idle) == len(self._tracked.kept) else self._listed(self._tracked.idle),
            "saved_with": self.saved_with,
        }

    def _listed(self, parameters: Iterable[Tensor]) -> list[str]:
        names = self.names()
        return [names[parameter] for parameter in parameters]

    def _of_names(self, listed: Collection[str]) -> list[Tensor]:
        return [parameter for parameter, name in self.names().items() if name in listed]

    def state_dict(self, *, whole: bool, lean: bool) -> dict[str, Any]:
        """The state of the outer loop, see `lightning_lookahead._saved_format`. No tensor of it is a live one.

        Args:
            whole: Of sharded weights, gather whole tensors on the first rank; by default each rank has its shards.
            lean: Leave out what the model's own ``state_dict`` gives: right after a sync that is all of it.
        """
        state = self.counters()
        weights = self._weights(lean=lean)
        momentum = {name: dict(values) for name, values in self._momentum.previous.items()}
        if not lean:
            kept = self._tracked.kept
            momentum = {
                name: {p: momentum.get(name, {}).get(p, torch.zeros_like(p)) for p in kept}
                for name in self._momentum.names
            }
        if self._sharded and self._module is not None:
            state["weights"] = self._shards(weights, whole=whole)
            state["momentum"] = self._shards(momentum, whole=whole)
            state["checksums"] = {}
        else:
            names = self.names()
            for part, entries in (("weights", weights), ("momentum", momentum)):
                state[part] = {
                    entry: dict(zip(map(names.get, values), copies(values.values()), strict=True))
                    for entry, values in entries.items()
                }
            beside = self._tracked.values(self.saved_with)
            sums = {
                which: {name: checksum(value) for name, value in own.items()} for which, own in state["weights"].items()
            }
            sums[self.saved_with] = {name: checksum(beside.get(p, p).to(p.dtype)) for p, name in names.items()}
            state["checksums"] = sums
        if self._buffers is not None:
            other = OTHER[self.saved_with]
            statistics = self._buffers.live if other == self._tracked.holds else self._buffers.kept
            state["statistics"] = {other: dict(zip(self._buffers.names, copies(statistics), strict=True))}
        return {name: value for name, value in state.items() if value or name not in {"momentum", "weights"}}

    def _weights(self, *, lean: bool) -> dict[str, dict[Tensor, Tensor]]:
        beside = self._tracked.values(self.saved_with)
        entries: dict[str, dict[Tensor, Tensor]] = {}
        for which in OTHER:
            own = self._tracked.values(which)
            if lean:
                own = {p: value for p, value in own.items() if not _agree(value, beside[p].to(p))}
            elif which == self.saved_with:  # slow weights that the model cannot hold without rounding
                own = {p: value for p, value in own.items() if self._tracked.is_apart(p) and which == "slow"}
            if own:
                entries[which] = own
        return entries

    def _shards(self, entries: Mapping[str, Mapping[Tensor, Tensor]], *, whole: bool) -> dict[str, dict[str, Any]]:
        assert self._module is not None  # noqa: S101 (asked for where the weights are sharded)
        found: dict[str, dict[str, Any]] = {}
        for entry, values in entries.items():
            cut = {p: words(local([value])[0], p.dtype) for p, value in values.items()}
            for index, level in enumerate(_levels(cut)):
                found[word_key(entry, index)] = named_shards(self._module, level, whole=whole)
        if not whole:
            return found
        dtypes = {name: slow_dtype(word.dtype, self._tracked.dtype) for name, word in found.get("slow", {}).items()}
        return without_words(found, dtypes)

    # -- loading

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts; what is tensors becomes `pending`.

        Raises:
            ValueError: If the state is damaged or of another model; nothing is changed then.
        """
        check_state(state)
        pending = self._by_piece(state) if self._sharded else self._by_parameter(state)
        pending.statistics = self._statistics(state.get("statistics", {}))
        self._inner_steps.restore(state["steps"])
        self._tracked.update_if_more()
        self._cycles.update(max(state["steps"], self._settings.start_step), self._tracked.kept)
        new = {"steps_since_sync": 0, "syncs": 0}  # of groups that were added since
        for cycle, saved in zip(self._cycles, chain([state, *state.get("groups", [])], repeat(new)), strict=False):
            cycle.begins = max(state["steps"] - saved["steps_since_sync"], self._settings.start_step)
            cycle.syncs = saved["syncs"]
        pending.trained = self._of_names(set(state.get("trained") or []))
        idle = state.get("idle", [])
        pending.idle = None if idle is None else self._of_names(set(idle))
        self.pending = pending

    def compare(self, state_dict: Mapping[str, Any]) -> None:
        """Note what the model's ``state_dict``, which has been read with the pending state, has for each parameter.

        That tells what was changed after it was read also where the module rounds or converts what it loads.
        """
        pending = self.pending
        if pending is None or not pending.checksums:
            return
        moved = pending.parameters
        for parameter, name in self.names().items():
            value = state_dict.get(name)
            if isinstance(value, torch.Tensor) and parameter in pending.checksums:
                saved = pending.checksums.pop(parameter)
                if parameter in moved and checksum(value) != saved:
                    pending.changed.add(parameter)
                if value.shape == parameter.shape and _was_rounded(value, parameter):
                    pending.loaded[parameter] = value

    def _by_parameter(self, state: dict[str, Any]) -> Pending:
        parameters = {name: parameter for parameter, name in self.names().items()}
        pending = Pending(state["steps"] > self._settings.start_step)
        chosen = dtype_of(state.get("slow_dtype"))
        dtypes = {name: slow_dtype(parameter.dtype, chosen) for name, parameter in parameters.items()}
        for part, into in (("weights", pending.weights), ("momentum", pending.momentum)):
            for entry, values in without_words(state.get(part, {}), dtypes).items():
                check_entries(entry, values, parameters)
                into[entry] = {parameters[name]: value for name, value in values.items() if name in parameters}
        sums, beside = state.get("checksums", {}), state.get("saved_with", self.saved_with)
        check_sums({which: own for which, own in state.get("weights", {}).items() if which != beside}, sums)
        own = sums.get(beside, {})
        pending.checksums = {parameters[name]: value for name, value in own.items() if name in parameters}
        return pending

    def _by_piece(self, state: dict[str, Any]) -> Pending:
        chosen = dtype_of(state.get("slow_dtype"))
        pending = Pending(state["steps"] > self._settings.start_step)
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
        assert self._module is not None  # noqa: S101 (given where the weights are sharded)
        names = names_in(self._module)
        return [
            p
            for p in parameters_of(self._optimizer)
            if getattr(p, "_is_flat_param", False) or not set(names.get(p, [])).isdisjoint(levels[0])
        ]

    def _pieces(self, levels: Sequence[Mapping[str, Any]], base: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What this rank has: of whole tensors, of shards, or of shards that were cut into words."""
        assert self._module is not None  # noqa: S101
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

    def _statistics(self, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
        if self._buffers is None:
            return {}
        names = self._buffers.names
        return {
            which: [values[name] for name in names]
            for which, values in saved.items()
            if all(name in values for name in names)
        }

    def place(self) -> None:
        """Put what was loaded in its place, again if the model was loaded since; phi is where the parameters are, else.

        It stays pending until training goes on.
        """
        pending = self.pending
        if pending is None or (pending.placed and pending.in_place):
            return
        pending.placed = True
        copy_(pending.loaded, pending.loaded.values())
        # Also what is frozen now: it was trained when it was saved.
        self._tracked.update({*pending.parameters, *pending.trained})
        self._cycles.update(max(self._inner_steps.total, self._settings.start_step), self._tracked.kept)
        self._tracked.start()
        self._tracked.begun = pending.begun
        if pending.idle is not None:
            self._tracked.idle = dict.fromkeys(p for p in pending.idle if p in self._tracked.kept)
        self._momentum.restore(pending.momentum)
        pending.left_out = changed = pending.unlike()
        if changed:
            message = (
                f"Lookahead: {len(changed)} of {len(pending.parameters)} parameters do not have the values that the"
                " weights in the checkpoint were saved with (changed while loading?). Those are left out: fast and slow"
                " weights both start from the values loaded."
            )
            warnings.warn(message, stacklevel=2)
        kept = self._tracked.kept
        places = {"fast": {p: p for p in kept}, "slow": kept}
        for which, values in pending.weights.items():
            own = [p for p in values if p in kept and p not in changed]
            if which == "fast" or pending.begun:  # before that phi is theta
                copy_([places[which][p] for p in own], [values[p] for p in own])
        if not pending.begun:
            self._tracked.start()
        if self._buffers is not None:
            self._buffers.start()
            for which, statistics in pending.statistics.items() if pending.begun else ():
                copy_(self._buffers.live if which == "fast" else self._buffers.kept, statistics)


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
