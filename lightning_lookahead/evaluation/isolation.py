"""Evaluating a module without a trace: random numbers, modes, buffers and metrics are restored."""

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
"""Attributes of a `Metric` beside its states; it has no public way to restore a state."""


@contextmanager
def isolated(module: nn.Module, others: Iterable[object] = ()) -> Iterator[None]:
    """Evaluate a module inside the ``with`` block; after it everything but weights and devices is what it was.

    That is: Python's, NumPy's and torch's random number generators (all devices), generators of the module and of
    ``others`` (loaders, a data module), which modules train, the buffers, and the states of metrics. Inside the block
    the buffers are copies: writing to the module's own would be noticed by a backward that is to come.
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
        rng.__exit__(None, None, None)  # by hand: it does not restore after an exception
        for generator, state in generators.items():
            generator.set_state(state)
        for part, mode in modes.items():
            part.training = mode
        for part, name, buffer in buffers:
            now = getattr(part, name)
            moved = now is not None and now.device != stand_ins[buffer].device and now.device != buffer.device
            setattr(part, name, buffer.to(now.device) if moved else buffer)
        for metric, states in metrics.items():
            for name, value in states.items():
                setattr(metric, name, _on(metric.device, value))


def _generators(owner: object) -> Iterator[torch.Generator]:
    """The generators of a loader and its samplers; or of a module or data module, its own and its loaders'."""
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
    # Metrics append to list states and clear them in place; they do not change the tensors in them.
    states = {
        name: copies([state])[0] if isinstance(state, torch.Tensor) else list(state)
        for name, state in metric.metric_state.items()
    }
    return {**states, **{name: getattr(metric, name) for name in _COUNTS}}


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, list):
        return [_on(device, item) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
