"""The step of `torch.optim.SGD` on a CPU in a single pass. Without it, and its one call, a sync is slower.

The plain operations go over the same values six times.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

EVEN = 64
"""Values of which torch's kernels leave none over: what is left over the fused one rounds in another way."""

FEW = 2**15
"""Values for which the plain operations are as fast: they stay in the cache."""


def sgd_step_(phi: Tensor, s: Tensor, b: Tensor, *, mu: float, nesterov: bool, alpha: float) -> None:
    """Move ``phi`` and its momentum ``b`` by the gradient ``s``, to the bits of plain operations; overwrites ``s``."""
    flat = phi.ndim == 1 and all(tensor.is_contiguous() for tensor in (phi, s, b))
    even = len(phi) // EVEN * EVEN if flat and len(phi) >= FEW and _is_exact(phi.dtype, nesterov=nesterov) else 0
    if even:
        _fused(phi[:even], s[:even], b[:even], mu=mu, nesterov=nesterov, alpha=alpha)
        phi, s, b = phi[even:], s[even:], b[even:]
    if not even or len(phi):
        _plain(phi, s, b, mu=mu, nesterov=nesterov, alpha=alpha)


def _plain(phi: Tensor, s: Tensor, b: Tensor, *, mu: float, nesterov: bool, alpha: float) -> None:
    b.mul_(mu).add_(s)
    phi.add_(s.add_(b, alpha=mu) if nesterov else b, alpha=-alpha)


def _fused(phi: Tensor, s: Tensor, b: Tensor, *, mu: float, nesterov: bool, alpha: float) -> None:
    torch._fused_sgd_(
        [phi],
        [s],
        [b],
        weight_decay=0.0,
        momentum=mu,
        lr=alpha,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,
    )


@functools.cache
def _is_exact(dtype: torch.dtype, *, nesterov: bool) -> bool:
    """Whether the fused kernel gives the plain operations' bits on this machine: it may add without rounding."""
    if dtype not in {torch.float32, torch.float64}:  # a product in half precision is rounded by plain operations alone
        return False
    numbers = torch.linspace(-1.0, 1.0, 3 * 4096, dtype=torch.float64).sin().mul(7.0).to(dtype).reshape(3, -1)
    plain, fused = numbers.clone(), numbers.clone()
    _plain(*plain, mu=0.9, nesterov=nesterov, alpha=0.7)
    try:
        _fused(*fused, mu=0.9, nesterov=nesterov, alpha=0.7)
    except Exception:  # noqa: BLE001 (a torch without it, or with other arguments)
        return False
    return torch.equal(plain[0], fused[0]) and torch.equal(plain[2], fused[2])
