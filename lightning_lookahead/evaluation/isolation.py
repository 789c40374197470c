"""Looking at a module without leaving a trace: random numbers, modes, buffers and metrics are as they were after it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_lookahead._lightning import isolate_rng
from lightning_lookahead.outer_loop.tensors import copies

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

_COUNTS = ("_update_count", "_computed", "_forward_cache")
"""What a `Metric` keeps beside its states; it has no public way to put a state back."""


@contextmanager
def isolated(module: nn.Module, others: Iterable[object] = ()) -> Iterator[None]:
    """Evaluate a module inside the ``with`` block and find it as it was after it, but for where its tensors are.

    Put back are Python's, NumPy's and torch's random number generators (all devices), those of the module and of
    ``others`` (loaders, a data module), which modules train, the buffers, and what metrics have gathered. Not the
    weights. Inside the block the buffers are copies: the module's own are not even written to, which a backward that
    is yet to come would notice.
    """
    generators = {g: g.get_state() for owner in (module, *others) for g in _generators(owner)}
    modes = {part: part.training for part in module.modules()}
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
    metrics = {part: _state_of(part) for part in module.modules() if isinstance(part, Metric)}
    unique = {buffer: None for _, _, buffer in buffers}  # a buffer may be shared
    stand_ins = dict(zip(unique, copies(unique), strict=True))
    for part, name, buffer in buffers:
        setattr(part, name, stand_ins[buffer])
    rng = isolate_rng()
    rng.__enter__()
    try:
        yield
    finally:
        rng.__exit__(None, None, None)  # also after an exception, which it would not do by itself
        for generator, state in generators.items():
            generator.set_state(state)
        for part, mode in modes.items():
            part.training = mode
        for part, name, buffer in buffers:
            now = getattr(part, name)
            moved = now is not None and now.device != stand_ins[buffer].device and now.device != buffer.device
            setattr(part, name, buffer.to(now.device) if moved else buffer)
        for metric, states in metrics.items():
            for name, kept in states.items():
                setattr(metric, name, _on(metric.device, kept))


def _generators(owner: object) -> Iterator[torch.Generator]:
    """Those of a loader and its samplers; those that a module or data module has, itself or in loaders."""
    if isinstance(owner, DataLoader):
        batch_sampler = getattr(owner, "batch_sampler", None)
        holders = (owner, owner.sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
    else:
        values = list(getattr(owner, "__dict__", {}).values())
        found = [generator for value in values if isinstance(value, DataLoader) for generator in _generators(value)]
        found += values
    yield from (generator for generator in found if isinstance(generator, torch.Generator))


def _state_of(metric: Metric) -> dict[str, Any]:
    # A list state is appended to and cleared in place, its tensors are not changed.
    states = {
        name: copies([state])[0] if isinstance(state, torch.Tensor) else list(state)
        for name, state in metric.metric_state.items()
    }
    return {**states, **{name: getattr(metric, name) for name in _COUNTS}}


def _on(device: torch.device, kept: Any) -> Any:
    if isinstance(kept, list):
        return [_on(device, item) for item in kept]
    return kept.to(device) if isinstance(kept, torch.Tensor) else kept
