"""Ranks that train apart: what they agree on and exchange where they meet. In between nothing leaves a rank."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import distributed

from .algorithm import outer_step
from .tensors import copy_, in_portions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from .tensors import OuterMomentum

Place = Literal["at a sync", "at the end of a batch", "at the start of an epoch", "at the end of an epoch"]
"""Where ranks meet."""

PATIENCE = 60
"""Seconds to wait for all ranks where some of them might not come."""


class Workers:
    """The ranks of a process group, each with fast weights of its own.

    Each method is a collective: all ranks call it, at one place of their runs. Numbers that ranks have to agree on go
    through a gloo group of their own, so that they wait for no device and do not mix with what others send.

    Args:
        group: The process group that the weights go through; ``None``: all processes.
        timeout: How long ranks wait for each other; ``None``: as long as torch does.

    Attributes:
        group: The process group.
        numbers: The gloo group.
        ranks: The ranks in the group, as all processes count them.
        rank: This rank's place among them.
    """

    def __init__(self, group: ProcessGroup | None = None, timeout: timedelta | None = None) -> None:
        self.group = group
        self.ranks = distributed.get_process_group_ranks(group)
        self.rank = distributed.get_rank(group)
        self.numbers = distributed.new_group(self.ranks, timeout=timeout, backend="gloo")

    def __getstate__(self) -> dict[str, Any]:
        """Without process groups, which belong to this process."""
        return {**self.__dict__, "group": None, "numbers": None}

    def agree(self, place: Place, *, steps: int, batches: int = 0, parameters: int = 0) -> None:
        """Check that all ranks have come to one place of the run.

        Args:
            place: The place.
            steps: Inner steps that this rank has attempted.
            batches: At the start of an epoch how many batches it has, -1 if that is unknown; at the end of a batch 1 if
                there is another, else 0.
            parameters: A checksum of what it trains.

        Raises:
            RuntimeError: On every rank, if one is elsewhere.
        """
        own = torch.tensor([get_args(Place).index(place), steps, batches, parameters])
        found = [torch.empty_like(own) for _ in self.ranks]
        distributed.all_gather(found, own, group=self.numbers)
        rows = [tuple(row.tolist()) for row in found]
        if len(set(rows)) > 1:
            raise RuntimeError(_come_apart(rows))

    def idle(self, parameters: Collection[Tensor], idle: Collection[Tensor]) -> dict[Tensor, None]:
        """The parameters that are idle on all ranks."""
        flags = torch.tensor([parameter in idle for parameter in parameters], dtype=torch.uint8)
        if len(flags):
            distributed.all_reduce(flags, distributed.ReduceOp.MIN, group=self.numbers)
        return dict.fromkeys(own for own, flag in zip(parameters, flags.tolist(), strict=True) if flag)

    def count(self, flag: bool) -> int:  # noqa: FBT001
        """On how many ranks the flag is set."""
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, group=self.numbers)
        return int(flags)

    def any(self, flag: bool) -> bool:  # noqa: FBT001
        """Whether the flag is set on a rank."""
        return self.count(flag) > 0

    def await_all(self) -> None:
        """Wait for all ranks, where some of them might not come.

        Raises:
            RuntimeError: If one does not come within a minute. These ranks cannot meet any more then.
        """
        arrived = distributed.all_reduce(torch.zeros(()), group=self.numbers, async_op=True)
        arrived.wait(timedelta(seconds=PATIENCE))

    @torch.no_grad()
    def outer_step(
        self,
        fast: Collection[Tensor],
        slow: Collection[Tensor],
        alpha: float,
        momentum: OuterMomentum | None = None,
    ) -> None:
        """Do `algorithm.outer_step` with the mean of all ranks' fast weights, formed in the slow weights' dtype.

        phi and b are equal on all ranks after it, bit for bit, if they were before it.
        """
        rows = (fast, slow, *([momentum.b] if momentum else []))
        for theta, phi, *b in in_portions(*rows, cut=True):
            mean = self.mean(theta, phi)
            outer_step(mean, phi, alpha, replace(momentum, b=b[0]) if momentum else None)
            copy_(theta, phi)

    def mean(
        self, tensors: Sequence[Tensor], like: Sequence[Tensor], number: int | None = None, *, takes_part: bool = True
    ) -> list[Tensor]:
        """The mean of each tensor over the ranks that take part; one all-reduce for each dtype.

        Each rank divides before the sum, as DDP does, so that the mean of finite values is finite.

        Args:
            tensors: This rank's.
            like: For each a tensor that has the mean's dtype, shape and strides.
            number: How many ranks take part; ``None``: all.
            takes_part: Whether this one does.
        """
        means: dict[int, Tensor] = {}
        for places in _alike([(other.dtype, tensor.device) for other, tensor in zip(like, tensors, strict=True)]):
            own = [tensors[at] for at in places]
            flat = own[0].new_empty(sum(tensor.numel() for tensor in own), dtype=like[places[0]].dtype)
            views = _views(flat, [like[at] for at in places])
            if takes_part:
                copy_(views, own)
            else:
                flat.zero_()
            distributed.all_reduce(flat.div_(number or len(self.ranks)), group=self.group)
            means.update(zip(places, views, strict=True))
        return [means[at] for at in range(len(tensors))]

    @torch.no_grad()
    def take_firsts(self, tensors: Sequence[Tensor]) -> None:
        """Let each tensor be what it is on the first rank; one broadcast for each dtype and portion."""
        for places in _alike([(tensor.dtype, tensor.device) for tensor in tensors]):
            for (portion,) in in_portions([tensors[at] for at in places]):
                flat = portion[0].new_empty(sum(tensor.numel() for tensor in portion))
                views = _views(flat, portion)
                copy_(views, portion)
                distributed.broadcast(flat, self.ranks[0], group=self.group)
                copy_(portion, views)


def _alike(kinds: Sequence[object]) -> list[list[int]]:
    """The places of each kind."""
    places: dict[object, list[int]] = {}
    for at, kind in enumerate(kinds):
        places.setdefault(kind, []).append(at)
    return list(places.values())


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A flat tensor, cut into views of the tensors' shapes and strides: arithmetic on them rounds as on the tensors."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    strides = [torch.empty_like(tensor, device="meta").stride() for tensor in tensors]  # dense, also of a slice
    return [
        part.as_strided(tensor.shape, stride, part.storage_offset())
        for part, tensor, stride in zip(parts, tensors, strides, strict=True)
    ]


def _come_apart(rows: list[tuple[int, ...]]) -> str:
    """The error's text: where each rank is, and how to keep ranks together."""
    places, steps, batches, _ = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    if len(places) > 1 or len(steps) > 1:
        where = (
            f"rank {at} is {get_args(Place)[place]} after {steps} steps" for at, (place, steps, *_) in enumerate(rows)
        )
        return (
            f"The ranks have come apart: {'; '.join(where)}. With share_gradients=False all ranks have to take equally"
            " many steps, each by an optimizer of self.optimizers(): where one rank leaves a step out, let it step"
            " without gradients."
        )
    if len(batches) > 1:
        known = get_args(Place)[places[0]] == "at the start of an epoch"
        have = [_length(number) if known else ("more" if number else "none") for number in batches]
        return (
            f"The ranks have different numbers of training batches (rank 0 has {have[0]}, another {have[1]}), and with"
            " share_gradients=False they meet after equally many steps: set Trainer(limit_train_batches=...), or give"
            " each rank a loader of equally many batches."
        )
    return (
        "The ranks train different parameters: with share_gradients=False freeze, unfreeze and add parameters on all"
        " ranks at one step."
    )


def _length(number: int) -> str:
    return "an unknown number" if number < 0 else str(number)
