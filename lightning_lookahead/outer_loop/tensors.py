"""Arithmetic over lists of tensors, in place and without gradients.

Two lists have equally many tensors, of equal shapes pairwise. Of a sharded tensor the functions see this rank's piece:
no collective is issued.
"""

from __future__ import annotations

import cmath
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's piece of each tensor: foreach operations know no DTensors."""
    tensors = list(tensors)
    if DTensor not in set(map(type, tensors)):
        return tensors
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's values lie: equal for two tensors that share storage, shape and strides."""
    (piece,) = local([tensor])
    return (piece.data_ptr(), piece.shape, piece.stride()) if piece.numel() else (id(tensor),)


@torch.inference_mode(mode=False)
@torch.no_grad()
def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copy each tensor into storage of its own, with its strides.

    The copies are ordinary tensors, also in inference mode (in which Lightning validates): a later sync could not
    update an inference tensor in place.
    """
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def copy_(targets: Collection[Tensor], sources: Collection[Tensor]) -> None:
    """Copy each source into its target; the two may be on different devices."""
    if targets:
        torch._foreach_copy_(local(targets), local(sources))


@torch.no_grad()
def interpolate_(slow: Collection[Tensor], fast: Collection[Tensor], alpha: float) -> None:
    """``slow <- slow + alpha * (fast - slow)``, the outer step of Algorithm 1.

    ``lerp`` computes it from the nearer end (``fast - (1 - alpha) * (fast - slow)`` from one half on), without a
    temporary, so that ``alpha=1`` gives ``fast`` exactly; ``slow + 1 * (fast - slow)`` would not.
    """
    pairs = list(zip(local(slow), local(fast), strict=True))
    alike = [(phi, theta) for phi, theta in pairs if phi.dtype == theta.dtype and phi.device == theta.device]
    if alike:
        torch._foreach_lerp_([phi for phi, _ in alike], [theta for _, theta in alike], alpha)
    for phi, theta in pairs if len(alike) < len(pairs) else ():
        if phi.dtype != theta.dtype or phi.device != theta.device:
            phi.lerp_(theta.to(phi), alpha)  # one tensor more at a time


@dataclass
class OuterMomentum:
    """Momentum of slow weights.

    Attributes:
        b: For each slow tensor one like it: the momentum, zero at the start.
        mu: The part of b that is left at the next outer step, in (0, 1).
        nesterov: Whether it is Nesterov's momentum.
    """

    b: list[Tensor]
    mu: float
    nesterov: bool


@torch.no_grad()
def descend_(slow: Collection[Tensor], fast: Collection[Tensor], momentum: OuterMomentum, alpha: float) -> None:
    """A step of `torch.optim.SGD` on ``slow`` with the gradient ``slow - fast``, formed in the dtype of ``slow``."""
    for phi, theta, b in in_portions(local(slow), local(fast), local(momentum.b)):
        s = [one - other.to(one) for one, other in zip(phi, theta, strict=True)]
        sgd_step_(phi, s, b, momentum, alpha)


def sgd_step_(phi: list[Tensor], s: list[Tensor], b: list[Tensor], momentum: OuterMomentum, alpha: float) -> None:
    """A step of `torch.optim.SGD` with the gradient ``s``, by its operations in their order; overwrites ``s``."""
    if not phi[0].is_cpu:
        torch._foreach_mul_(b, momentum.mu)
        torch._foreach_add_(b, s)
        if momentum.nesterov:
            torch._foreach_add_(s, b, alpha=momentum.mu)
        torch._foreach_add_(phi, s if momentum.nesterov else b, alpha=-alpha)
        return
    # On a CPU one by one, as there: foreach would round mu to a half precision before it multiplies.
    for slow, way, moved in zip(phi, s, b, strict=True):
        moved.mul_(momentum.mu).add_(way)
        slow.add_(way.add_(moved, alpha=momentum.mu) if momentum.nesterov else moved, alpha=-alpha)


def in_portions(*lists: Collection[Tensor], cut: bool = False) -> Iterator[tuple[list[Tensor], ...]]:
    """Equally long lists in portions of at most `PORTION` values, or of one tensor.

    Args:
        lists: Lists of tensors, of equal shapes across the lists.
        cut: Cut tensors of more values into pieces, flat views, if they are contiguous.
    """
    portion: list[tuple[Tensor, ...]] = []
    size = 0
    rows = zip(*lists, strict=True)
    for row in (piece for whole in rows for piece in _pieces(whole)) if cut else rows:
        size += row[0].numel()
        if portion and size > PORTION:
            yield tuple(map(list, zip(*portion, strict=True)))
            portion, size = [], row[0].numel()
        portion.append(row)
    if portion:
        yield tuple(map(list, zip(*portion, strict=True)))


def _pieces(row: tuple[Tensor, ...]) -> Iterable[tuple[Tensor, ...]]:
    if row[0].numel() <= PORTION or not all(tensor.is_contiguous() for tensor in row):
        return [row]
    return zip(*(torch.split(tensor.view(-1), PORTION) for tensor in row), strict=True)


PORTION = 2**24
"""Values of a temporary copy: little beside the weights of a large model."""


@torch.no_grad()
def exchange_(left: Collection[Tensor], right: Collection[Tensor]) -> None:
    """Exchange the values of each pair, all or none, with extra memory for one tensor at a time."""
    left, right = local(left), local(right)
    done = 0
    try:
        for a, b in zip(left, right, strict=True):
            values = a.clone()
            a.copy_(b)
            try:
                b.copy_(values)
            except BaseException:
                a.copy_(values)
                raise
            del values  # before the next one is made
            done += 1
    except BaseException:  # out of memory, say: half exchanged, the weights would be neither set
        exchange_(left[:done], right[:done])
        raise


@torch.no_grad()
def seem_finite(tensors: Collection[Tensor]) -> bool:
    """Whether all values are finite, as fast as memory can be read; waits for the device once.

    ``True`` is certain. After ``False`` ask `not_finite`: a sum of finite values may overflow.
    """
    listed = local(tensors)
    if not all(tensor.is_cpu for tensor in listed):
        return not not_finite(listed)  # one kernel for all tensors; sums would be one each
    return all(cmath.isfinite(_sum(tensor).item()) for tensor in listed)


def _sum(tensor: Tensor) -> Tensor:
    return tensor.sum(dtype=torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None)


@torch.no_grad()
def not_finite(tensors: Collection[Tensor]) -> list[int]:
    """Which of the tensors have a value that is NaN or infinite; waits for the device once."""
    listed = local(tensors)
    filled = [index for index, tensor in enumerate(listed) if tensor.numel()]
    if not filled:
        return []
    largest = torch._foreach_norm([listed[index] for index in filled], float("inf"))
    finite = torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().tolist()
    return [index for index, fine in zip(filled, finite, strict=True) if not fine]


@torch.no_grad()
def distance(left: Collection[Tensor], right: Collection[Tensor]) -> Tensor:
    """Euclidean distance between two lists seen as two long vectors: a 0-dim tensor on the first one's device."""
    if not left:
        return torch.tensor(0.0)
    norms = [_norm(a - b.to(a.device)) for a, b in zip(local(left), local(right), strict=True)]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    return total


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return norm


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether all values are equal; of shards, on this rank. Waits for the device."""
    return torch.equal(*local([left, right]))


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes in row-major order: equal bits give equal sums on every device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: Tensor) -> Tensor:
    """A sum over a tensor's values read as integers, weighted by their places: exact in any order of summation.

    Two tensors with different values, or with values in different places, have different sums, but for rare chance.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.detach().reshape(-1).view(_BITS[real.element_size()])
    whole = len(bits) // _WIDTH * _WIDTH
    rows, rest = bits[:whole].view(-1, _WIDTH), bits[whole:]
    sums = [rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64), rest.to(torch.int64)]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for factor, part in zip((3, 5, 7), sums, strict=True):
        total += factor * (part * torch.arange(1, len(part) + 1, device=bits.device)).sum()
    return total


_WIDTH = 2**10
"""Values in a row of `bit_sum`, which needs memory for one row and one column."""
