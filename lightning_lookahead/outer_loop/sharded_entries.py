"""Entries of a state, parameter -> value, as shards and back; a value wider than its parameter goes in words."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from .names import names_in
from .saved_format import OUTER_MOMENTUM, joined, slow_dtype, without_words, word_key, words
from .settings import dtype_of
from .sharding import named_shards, pieces
from .tensors import local

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from .parameters import Parameters

Entries = dict[str, dict["Tensor", "Tensor"]]
"""Name of an entry -> parameter -> value."""


class ShardedEntries:
    """Converts the entries of one outer loop, whose parameters are sharded. All ranks take part.

    Args:
        parameters: The parameters, and the module that names them.
        slow_dtype: The ``slow_dtype`` of the run that the entries are of.
    """

    def __init__(self, parameters: Parameters, slow_dtype: str | None) -> None:
        assert parameters.module is not None  # noqa: S101 (there is one where the weights are sharded)
        self._module, self._listed = parameters.module, parameters.listed
        self._chosen = dtype_of(slow_dtype)

    def cut(self, entries: Entries, *, whole: bool) -> dict[str, dict[str, Any]]:
        """Name of an entry, or of a word of it -> parameter name -> shard.

        Args:
            entries: The values, this rank's pieces.
            whole: Gather whole tensors on the first rank instead, in the entry's own dtype.
        """
        found: dict[str, dict[str, Any]] = {}
        for entry, values in entries.items():
            cut = {p: words(local([value])[0], p.dtype) for p, value in values.items()}
            for index, level in enumerate(_levels(cut)):
                found[word_key(entry, index)] = named_shards(self._module, level, whole=whole)
        if not whole:
            return found
        words_of = {**found.get("slow", {}), **found.get(OUTER_MOMENTUM, {})}
        return without_words(found, {name: slow_dtype(word.dtype, self._chosen) for name, word in words_of.items()})

    def weights(self, saved: Mapping[str, Mapping[str, Any]]) -> Entries:
        """This rank's pieces of saved weights; the parameters' own where a name is missing."""
        found: Entries = {}
        for entry, levels in _by_level(saved):
            dtypes = {p: slow_dtype(p.dtype, self._chosen) if entry == "slow" else p.dtype for p in self._in(levels)}
            found[entry] = self._pieces(levels, {p: local([p])[0].to(dtype) for p, dtype in dtypes.items()})
        return found

    def momentum(self, saved: Mapping[str, Mapping[str, Any]]) -> Entries:
        """This rank's pieces of saved momentum, inner and outer; zero where a name is missing."""
        found: Entries = {}
        for entry, levels in _by_level(saved):
            zeros = {p: torch.zeros_like(local([p])[0]) for p in self._in(levels)}
            if entry == OUTER_MOMENTUM or len(levels) > 1:
                chosen = self._chosen if entry == OUTER_MOMENTUM else None
                zeros = {p: zero.to(slow_dtype(p.dtype, chosen)) for p, zero in zeros.items()}
            found[entry] = self._pieces(levels, zeros)
        return found

    def _in(self, levels: list[Mapping[str, Any]]) -> list[Tensor]:
        """The parameters that an entry has a value for; an FSDP1 flat parameter stands for several."""
        names = names_in(self._module)
        return [
            p
            for p in self._listed
            if getattr(p, "_is_flat_param", False) or not set(names.get(p, [])).isdisjoint(levels[0])
        ]

    def _pieces(self, levels: Sequence[Mapping[str, Any]], base: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """This rank's piece of each parameter's value: from whole tensors, shards, or shards cut into words."""
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


class Shards(dict[str, Any]):
    """The state of sharded weights, which cannot be pickled: no run can resume from the shards of one rank."""

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        message = (
            "SlowWeights.state_dict() holds this rank's shards, for torch.distributed.checkpoint: to pickle, as"
            " Fabric.save does on one rank, give it SlowWeights.state_dict(whole=True)."
        )
        raise TypeError(message)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        return Shards({key: copy.deepcopy(value, memo) for key, value in self.items()})


def _is_shard(value: object) -> bool:
    return hasattr(value, "local_shards") or hasattr(value, "to_local")


def _by_level(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Each entry and its levels: the first words of all tensors, the second words of tensors that have one, ..."""
    for entry in [key for key in entries if "." not in key]:
        levels = [entries[entry]]
        while word_key(entry, len(levels)) in entries:
            levels.append(entries[word_key(entry, len(levels))])
        yield entry, levels


def _levels(cut: Mapping[Any, list[Tensor]]) -> list[dict[Any, Tensor]]:
    """Levels of words: the first of each tensor, the second of each that has one, ..."""
    longest = max(map(len, cut.values()), default=0)
    return [{key: parts[index] for key, parts in cut.items() if len(parts) > index} for index in range(longest)]
