"""Which parameters of an optimizer are trained, and the second tensor that each of them has."""

from __future__ import annotations

import operator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lightning_lookahead._cycles import Moving
from lightning_lookahead._offload import Offload
from lightning_lookahead._saved_format import slow_dtype
from lightning_lookahead._tensors import copies, copy_, equal, exchange_, not_finite, place

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_lookahead._saved_format import Weights


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Tracked:
    """The trained parameters of an optimizer, each with a tensor that starts from its value when it appears.

    Parameters that need no gradient are left out until they do; those on one storage count once. A parameter that was
    trained stays although it is frozen later. Those to exclude are left out whatever they need.

    The second tensor holds the set of weights that the parameter does not hold. Where it is *apart*, of another dtype
    or on another device than its parameter, it holds the slow weights always, so that they are never rounded; then a
    third tensor keeps the fast weights while the parameter holds the slow ones.

    Args:
        optimizer: The optimizer.
        exclude: Parameters to leave out.
        dtype: Of the second tensors; by default the parameter's, but at least float32.
        device: Of the second tensors; by default the parameter's.

    Attributes:
        holds: Which weights the parameters hold.
        dtype: Of the second tensors, as it was chosen.
        listed: All parameters of the optimizer: one that another optimizer owns moves in a step, too.
        begun: Whether there are two sets: until the first cycle begins there is one.
        shared: Those that another optimizer moves, too.
        idle: Trained parameters that have had no gradient in the optimizer's own steps since their last sync.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        exclude: Collection[Tensor] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._kept: dict[Tensor, Tensor] = {}
        self._offload = Offload()
        self.holds: Weights = "fast"
        self._aside: dict[Tensor, Tensor] = {}  # fast weights of those that are apart, while they hold the slow ones
        self._parted: set[Tensor] = set()  # which are two, where a swap right after a sync expects one
        self._optimizer = optimizer
        self._exclude = set(exclude)
        self.dtype, self._device = dtype, device
        self.listed: list[Tensor] = []
        self.begun = False
        self.shared: Collection[Tensor] = ()
        self.idle: dict[Tensor, None] = {}
        self._left_alone: list[Tensor] = []
        self.update()

    @property
    def kept(self) -> dict[Tensor, Tensor]:
        """Trained parameter -> its second tensor."""
        self._offload.wait()
        return self._kept

    def update(self, also: Collection[Tensor] = ()) -> None:
        """Look at the optimizer's groups again; take in ``also``, whether they need a gradient or not."""
        self.listed = parameters_of(self._optimizer)
        places = {place(parameter): parameter for parameter in reversed(self.listed)}
        single = dict.fromkeys(reversed(places.values()))
        trained = [p for p in single if (p in self.kept or p.requires_grad or p in also) and p not in self._exclude]
        new = [parameter for parameter in trained if parameter not in self.kept]
        new_ones = set(new)
        known = {**self.kept, **dict(zip(new, self._second(new), strict=True))}
        self.idle = dict.fromkeys(parameter for parameter in trained if parameter in self.idle or parameter in new_ones)
        self._kept = {parameter: known[parameter] for parameter in trained}
        self._left_alone = [parameter for parameter in single if parameter not in self.kept]

    def update_if_more(self) -> bool:
        """Take in parameters that were added or unfrozen, and say if there are any; costs nothing per trained one."""
        listed = sum(len(group["params"]) for group in self._optimizer.param_groups)
        unfrozen = (parameter.requires_grad and parameter not in self._exclude for parameter in self._left_alone)
        if listed != len(self.listed) or any(unfrozen):
            self.update()
            return True
        return False

    def update_if_other(self) -> None:
        """Take in parameters that were put in the place of others."""
        if any(map(operator.is_not, self.listed, parameters_of(self._optimizer))):
            self.update()

    def follow(self) -> None:
        """Move what is kept to where its parameter is now, unless it has a place of its own."""
        if self._device is None and any(kept.device != parameter.device for parameter, kept in self.kept.items()):
            self._kept = {parameter: kept.to(parameter.device) for parameter, kept in self.kept.items()}
            self._aside = {parameter: fast.to(parameter.device) for parameter, fast in self._aside.items()}

    def start(self) -> None:
        """Let each second tensor have its parameter's value."""
        self._offload.forget()
        copy_(self.kept.values(), self.kept)

    def note_gradients(self) -> None:
        """Note which have a gradient in a step: after the first one of a cycle only those are asked that had none.

        What FSDP1 shows of a parameter of which this rank has no piece says nothing.
        """
        if self.idle:
            self.idle = {parameter: None for parameter in self.idle if parameter.grad is None and parameter.numel()}

    # -- syncing

    def prepare(self) -> None:
        """Say that a sync comes after the next step: what is on the CPU can set out for the GPU."""
        self._offload.fetch(self._remote(self._kept.items()))

    @contextmanager
    def at_hand(self, moving: Moving) -> Iterator[Moving]:
        """Let slow weights that are kept on the CPU be beside their fast ones inside the ``with`` block."""
        remote = self._remote(zip(moving.fast, moving.slow, strict=True))
        if not remote:
            yield moving
            return
        beside = self._offload.take(remote)
        yield Moving(moving.fast, [beside.get(theta, phi) for theta, phi in zip(moving.fast, moving.slow, strict=True)])
        self._offload.store(remote, beside)

    def _remote(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
        if self._device is None:
            return {}
        return {theta: phi for theta, phi in pairs if theta.is_cuda and not phi.is_cuda}

    # -- either set

    def values(self, weights: Weights) -> dict[Tensor, Tensor]:
        """Each trained parameter and its value in ``weights``: live tensors, not copies."""
        if weights == "fast":
            return {p: p for p in self.kept} if self.holds == "fast" or not self.begun else {**self.kept, **self._aside}
        held = set() if self.holds == "fast" else self.kept.keys() - self._aside.keys()
        if not self.begun:  # then a second tensor of fewer digits has not even the one set
            held = {p for p, kept in self.kept.items() if torch.promote_types(p.dtype, kept.dtype) != kept.dtype}
        return {parameter: parameter if parameter in held else kept for parameter, kept in self.kept.items()}

    @torch.inference_mode(mode=False)  # in which Lightning validates; what is kept outlives it
    def put(self, weights: Weights, *, synced: bool = False) -> None:
        """Let the parameters hold ``weights``; all of them do, or none if there is no memory for it.

        Args:
            weights: The set that they hold then.
            synced: No step was taken since both were made equal: what was written from outside since belongs to both.
        """
        if weights == self.holds or not self.begun:
            self.holds = weights
            return
        if weights == "slow":
            apart = [parameter for parameter in self.kept if self.is_apart(parameter)]
            aside = {parameter: parameter.detach().to(self._device, copy=True) for parameter in apart}
            sources = [self.kept[parameter] for parameter in apart]
        else:  # which were apart then: since, the module may have been moved to where what is kept is
            apart, aside, sources = list(self._aside), {}, list(self._aside.values())
        listed = set(apart)
        together = {parameter: kept for parameter, kept in self.kept.items() if parameter not in listed}
        if synced:
            parted = self._parted  # in the swap that this one undoes
            if weights == "slow":
                self._parted = parted = self.adopt(self.shared)
            else:
                self.adopt(parted)
                self._parted = set()
            together = {p: kept for p, kept in together.items() if p in parted}
            paired = [(p, source) for p, source in zip(apart, sources, strict=True) if p in parted]
            apart, sources = [p for p, _ in paired], [source for _, source in paired]
        exchange_(together, together.values())
        copy_(apart, sources)
        self._aside = aside
        self.holds = weights

    def adopt(self, except_for: Collection[Tensor]) -> set[Tensor]:
        """Right after a sync, let both sets have what was written into the parameters from outside since.

        Returns:
            Those of which the sets remain two: no slow weight becomes infinite or NaN by this.
        """
        unlike = {p: kept for p, kept in self.kept.items() if not equal(p, kept.to(p))}
        two = {p for p in unlike if p in except_for or not_finite([p])}
        written = {p: kept for p, kept in unlike.items() if p not in two}
        copy_(written.values(), written)
        return two

    def is_apart(self, parameter: Tensor) -> bool:
        """Whether its second tensor is of another dtype or on another device."""
        kept = self.kept[parameter]
        return kept.dtype != parameter.dtype or kept.device != parameter.device

    def end_swap(self) -> None:
        """Take what the parameters hold now for the fast weights: something was loaded into them."""
        self.holds, self._aside, self.begun = "fast", {}, False
        self._offload.forget()

    @torch.inference_mode(mode=False)
    def _second(self, parameters: list[Tensor]) -> list[Tensor]:
        seconds = [second.to(self._device, slow_dtype(second.dtype, self.dtype)) for second in copies(parameters)]
        remote = self._device is not None and self._device.type == "cpu"
        return [
            second.pin_memory() if remote and parameter.is_cuda else second
            for parameter, second in zip(parameters, seconds, strict=True)
        ]
