"""The outer loops of a fit: one for each of its optimizers."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning_lookahead.outer_loop.inner_optimizer import check_optimizer
from lightning_lookahead.outer_loop.names import names_in
from lightning_lookahead.outer_loop.parameters import parameters_of
from lightning_lookahead.outer_loop.saved_format import check_weights
from lightning_lookahead.outer_loop.slow_weights import SlowWeights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.settings import Settings

OTHERS_LOADED = (
    "the module does not hold the weights that the fit has left in it (others were loaded since), and the second set is"
    " that fit's. A checkpoint holds both sets: compare_weights(..., ckpt_path=path) or load_weights(path)."
)


class OuterLoops:
    """The slow weights of all optimizers, from the start of a fit until the next one starts.

    Attributes:
        slow_weights: The slow weights of each optimizer, in the optimizers' order.
        left: For each, the fingerprint of what the fit left in the module; empty until it ends.
    """

    def __init__(self) -> None:
        self.slow_weights: list[SlowWeights] = []
        self.left: list[list[int]] = []

    def add(
        self,
        optimizers: list[Optimizer],
        settings: Settings,
        exclude: list[str],
        pl_module: LightningModule,
        **options: Any,
    ) -> None:
        """Make slow weights for these optimizers.

        Args:
            optimizers: All optimizers of the fit.
            settings: The options of each outer loop. BatchNorm's statistics sync with the first one.
            exclude: Patterns of names of parameters to leave alone.
            pl_module: The module, before a strategy wrapped it.
            options: Further arguments of `SlowWeights`.

        Raises:
            TypeError: If an optimizer is not a torch optimizer.
            ValueError: If an optimizer cannot have slow weights; those before it then have some: `close` them.
        """
        for optimizer in optimizers:
            check_optimizer(optimizer)
        excluded = matching(exclude, pl_module)
        elsewhere = owned_by_others(optimizers, pl_module)
        shared = [parameter for own in elsewhere for parameter in own]
        for index, optimizer in enumerate(optimizers):
            own = {**vars(settings), **options}
            if index:
                own |= {"buffers": "keep", "share_buffers": None}
            left_out = [*excluded, *elsewhere[index]]
            self.slow_weights.append(SlowWeights(optimizer, **own, exclude=left_out, shared=shared, sync_in_step=False))

    @property
    def counting(self) -> list[SlowWeights]:
        """The slow weights of a fit that is under way: none before it, after it or after an exception in it."""
        return [slow for slow in self.slow_weights if slow.inner_loop.watches]

    def due(self, slow: SlowWeights, *, together: bool) -> list[SlowWeights]:
        """The slow weights to sync after a step of the optimizer of ``slow``; ``together``: all, when all are due."""
        if not slow.due:
            return []
        if not together:
            return [slow]
        return self.slow_weights if all(each.due for each in self.slow_weights) else []

    def are_of(self, optimizers: list[Any]) -> bool:
        """Whether the slow weights are those of these optimizers."""
        return [id(slow.optimizer) for slow in self.slow_weights] == [id(optimizer) for optimizer in optimizers]

    def swap_to(self, weights: Weights) -> None:
        """Let the module hold ``weights``, in a fit that is under way."""
        for slow in self.counting:
            slow.swap_to(weights)

    @contextmanager
    def use(self, weights: Weights, *, statistics: bool = True) -> Iterator[None]:
        """Let the module hold ``weights`` inside the ``with`` block."""
        with ExitStack() as stack:
            for slow in self.slow_weights:
                stack.enter_context(slow.use(weights, statistics=statistics))
            yield

    def move_to_parameters(self) -> None:
        """Move the slow weights to the module's device: after a fit Lightning moves the module to the CPU."""
        for slow in self.slow_weights:
            slow.swap_to(slow.active)

    def check_sets(self, weights: Weights) -> None:
        """Raise if there are no two sets to use one of."""
        check_weights(weights)
        if not self.slow_weights:
            message = (
                "There is one set of weights only: use_weights() works from the start of a fit on, in the process that"
                " trains (strategies that spawn or fork bring back phi alone)."
            )
            raise RuntimeError(message)
        if self.others_loaded:
            message = f"use_weights({weights!r}): {OTHERS_LOADED}"
            raise RuntimeError(message)

    def close(self) -> None:
        """Stop counting; both sets stay."""
        for slow in self.slow_weights:
            slow.close()

    def leave(self) -> None:
        """Remember the weights that the fit leaves in the module."""
        self.left = [slow.pairs.fingerprint(slow.parameters.module) for slow in self.slow_weights]

    @property
    def others_loaded(self) -> bool:
        """Whether the module holds other weights than the fit left in it; both sets here are that fit's."""
        return any(
            slow.pairs.fingerprint(slow.parameters.module) != left
            for slow, left in zip(self.slow_weights, self.left, strict=False)
        )


def matching(patterns: list[str], pl_module: LightningModule) -> list[Tensor]:
    """The parameters with a name that matches one of the patterns; raises if one matches none."""
    found: dict[Tensor, None] = {}
    names = names_in(pl_module)
    for pattern in patterns:
        own = [parameter for parameter, its in names.items() if any(fnmatchcase(name, pattern) for name in its)]
        if not own:
            message = (
                f"exclude={pattern!r} matches no parameter: names are {', '.join(its[0] for its in names.values())}."
            )
            raise ValueError(message)
        found.update(dict.fromkeys(own))
    return list(found)


def owned_by_others(optimizers: list[Optimizer], pl_module: LightningModule) -> list[list[Tensor]]:
    """For each optimizer the parameters that an earlier one trains, too: their slow weight is the earlier one's."""
    names = names_in(pl_module)
    owner: dict[Tensor, int] = {}
    found: list[list[Tensor]] = []
    for index, optimizer in enumerate(optimizers):
        found.append([p for p in parameters_of(optimizer) if owner.setdefault(p, index) != index])
    shared = list(dict.fromkeys(parameter for own in found for parameter in own))
    if shared:
        first = names.get(shared[0], ["(of another module)"])[0]
        others = f" and {len(shared) - 1} more are" if len(shared) > 1 else " is"
        message = (
            f"Lookahead: parameter {first!r}{others} in several optimizers. It is synced when the first of them,"
            f" optimizer {owner[shared[0]]}, has taken its k steps."
        )
        warnings.warn(message, stacklevel=2)
    return found
