"""Looking at a module without leaving a trace: random numbers, modes, buffers and metrics are as they were after it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

from lightning_lookahead._lightning import isolate_rng
from lightning_lookahead._tensors import copies

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

_COUNTS = ("_update_count", "_computed", "_forward_cache")
"""What a `Metric` keeps beside its states; it has no public way to put a state back."""


@contextmanager
def undisturbed(module: nn.Module, loaders: Iterable[object] = ()) -> Iterator[None]:
    """Evaluate a module inside the ``with`` block and find it as it was after it, but for where its tensors are.

    Put back are Python's, NumPy's and torch's random number generators (all devices) and those of the ``loaders``,
    which modules train, the values of buffers, and what metrics have gathered. Not the weights.
    """
    generators = {generator: generator.get_state() for loader in loaders for generator in _generators(loader)}
    modes = {part: part.training for part in module.modules()}
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
    values = copies(buffer for _, _, buffer in buffers)
    metrics = {part: _state_of(part) for part in module.modules() if isinstance(part, Metric)}
    try:
        with isolate_rng():
            yield
    finally:
        for generator, state in generators.items():
            generator.set_state(state)
        for part, mode in modes.items():
            part.training = mode
        for (part, name, buffer), value in zip(buffers, values, strict=True):
            _put_back(part, name, buffer, value)
        for metric, states in metrics.items():
            for name, kept in states.items():
                setattr(metric, name, _on(metric.device, kept))


def _generators(loader: object) -> Iterator[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def _put_back(part: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    now = getattr(part, name)
    if now is not buffer and now is not None and now.device != buffer.device:  # the module was moved since
        buffer = now
    with torch.no_grad():
        buffer.copy_(value)
    setattr(part, name, buffer)


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
