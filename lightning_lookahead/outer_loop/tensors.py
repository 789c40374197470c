"""Arithmetic over lists of tensors, in place and without gradients.

Two lists have equally many tensors, of equal shapes pairwise. Of a sharded tensor the functions see this rank's piece:
no collective is issued.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from . import fused_momentum

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


def as_they_are(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor itself, for a file; a view is copied, as a file would hold all that it is a view of."""
    return [t.detach() if t.untyped_storage().nbytes() == t.nbytes else t.detach().clone() for t in tensors]


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


def difference(phi: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
    """``phi - theta`` in phi's dtype; it overwrites each theta that can hold it."""
    return [
        torch.sub(one, other, out=other)
        if one.dtype == other.dtype and one.device == other.device
        else one - other.to(one)
        for one, other in zip(phi, theta, strict=True)
    ]


def sgd_step_(phi: list[Tensor], s: list[Tensor], b: list[Tensor], momentum: OuterMomentum, alpha: float) -> None:
    """A step of `torch.optim.SGD` with the gradient ``s``, by its operations in their order; overwrites ``s``."""
    mu, nesterov = momentum.mu, momentum.nesterov
    on_cpu = all(slow.is_cpu for slow in phi)
    if on_cpu and (len(phi) == 1 or any(slow.dtype.itemsize < 4 for slow in phi)):  # noqa: PLR2004 (of float32)
        # One by one, as there: foreach would round mu to a half precision before it multiplies.
        for row in zip(phi, s, b, strict=True):
            fused_momentum.sgd_step_(*row, mu=mu, nesterov=nesterov, alpha=alpha)
        return
    torch._foreach_mul_(b, mu)
    torch._foreach_add_(b, s)
    if nesterov:
        torch._foreach_add_(s, b, alpha=mu)
    torch._foreach_add_(phi, s if nesterov else b, alpha=-alpha)


def in_portions(*lists: Collection[Tensor], most: int = 0, cut: bool = False) -> Iterator[tuple[list[Tensor], ...]]:
    """Equally long lists in portions of so many values, or of one tensor.

    Args:
        lists: Lists of tensors, of equal shapes across the lists.
        most: Values of a portion; by default `PORTION`.
        cut: Cut tensors of more values into pieces, flat views, if they are contiguous.
    """
    most = most or PORTION
    portion: list[tuple[Tensor, ...]] = []
    size = 0
    rows = zip(*lists, strict=True)
    for row in (piece for whole in rows for piece in _pieces(whole, most)) if cut else rows:
        size += row[0].numel()
        if portion and size > most:
            yield tuple(map(list, zip(*portion, strict=True)))
            portion, size = [], row[0].numel()
        portion.append(row)
    if portion:
        yield tuple(map(list, zip(*portion, strict=True)))


def _pieces(row: tuple[Tensor, ...], most: int) -> Iterable[tuple[Tensor, ...]]:
    if row[0].numel() <= most or not all(tensor.is_contiguous() for tensor in row):
        return [row]
    return zip(*(torch.split(tensor.view(-1), most) for tensor in row), strict=True)


PORTION = 2**24
"""Values of a temporary copy: little beside the weights of a large model."""

BLOCK = 2**18
"""Values that stay in a CPU's cache from the first call on them to the last."""


def in_blocks(fast: Collection[Tensor], slow: Collection[Tensor], b: Collection[Tensor]) -> Iterator[Any]:
    """`in_portions` for an outer step with momentum: on a CPU they stay in the cache from its first call to its last.

    Half precision slow weights are not cut: torch rounds a product in the last values of a tensor in another way.
    """
    lists = [local(tensors) for tensors in (fast, slow, b)]
    if not all(phi.is_cpu and phi.dtype in {torch.float32, torch.float64} for phi in lists[1]):
        return in_portions(*lists)
    # Several threads divide a block, so that it may be larger, and wait for each other less often.
    return in_portions(*lists, most=BLOCK * (1 if torch.get_num_threads() == 1 else 4), cut=True)


@torch.no_grad()
def exchange_(left: Collection[Tensor], right: Collection[Tensor]) -> None:
    """Exchange the values of each pair, all or none, with extra memory for one portion or tensor at a time."""
    left, right = local(left), local(right)
    on_cpu = all(tensor.is_cpu for tensor in (*left, *right))
    _exchange_(list(in_portions(left, right, most=BLOCK if on_cpu else PORTION, cut=True)))


def _exchange_(portions: list[Any]) -> None:
    done = 0
    try:
        for a, b in portions:
            values = copies(a)
            try:
                copy_(a, b)
            except BaseException:  # some tensors of a portion may be copied, and others not
                copy_(a, values)
                raise
            try:
                copy_(b, values)
            except BaseException:
                copy_(b, a)
                copy_(a, values)
                raise
            del values  # before the next ones are made
            done += 1
    except BaseException:  # out of memory, say: half exchanged, the weights would be neither set
        _exchange_(portions[:done])
        raise


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


def checksums(tensors: Collection[Tensor]) -> list[int]:
    """The `checksum` of each tensor, several at a time where that is worth it: reading bytes lets other threads run."""
    if sum(tensor.nbytes for tensor in tensors) < WORTH_THREADS:
        return list(map(checksum, tensors))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(checksum, tensors))


WORTH_THREADS = 2**24
"""Bytes that take longer to read than threads to start."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: Tensor) -> Tensor:
    """A sum over a tensor's values read as integers, weighted by their places: exact in any order of summation.

    Two tensors with different values, or with values in different places, have different sums, but for rare chance.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.detach().reshape(-1).view(_BITS[real.element_size()])
    whole = len(bits) // _WIDTH * _WIDTH
    rows, rest = bits[:whole].view(-1, _WIDTH), bits[whole:].to(torch.int64)
    by_row, by_column = [], []
    for block in torch.split(rows, _ROWS):
        numbers = block.to(torch.int64)  # it stays in a CPU's cache for both sums
        by_row.append(numbers.sum(1))
        by_column.append(numbers.sum(0))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for factor, part in zip((3, 5, 7), (torch.cat(by_row), torch.stack(by_column).sum(0), rest), strict=True):
        total += factor * (part * torch.arange(1, len(part) + 1, device=bits.device)).sum()
    return total


_WIDTH = 2**10
"""Values in a row of `bit_sum`."""

_ROWS = 2**7
"""Rows of a block of `bit_sum`: a megabyte of integers."""
