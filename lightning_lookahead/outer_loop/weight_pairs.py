"""Fast and slow weights of each trained parameter, and which set the parameters hold."""

from __future__ import annotations

import operator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .moving import Moving
from .offload import Offload
from .outer_momentum import MomentumBuffers
from .parameters import parameters_of
from .saved_format import OTHER, check_weights, slow_dtype
from .settings import device_of, dtype_of
from .tensors import bit_sum, copies, copy_, distance, equal, exchange_, local, not_finite, storage_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from .saved_format import Weights
    from .settings import Settings


_NEEDS_GRADIENT = operator.attrgetter("requires_grad")


class WeightPairs:
    """The trained parameters of an optimizer, each with a counterpart that starts from its value when it appears.

    A parameter that needs no gradient is left out until it does, and stays when it is frozen again. Parameters that
    share storage count once. Excluded parameters are left out always.

    The counterpart holds the set of weights that is not active. A counterpart that is *apart*, of another dtype or on
    another device than its parameter, always holds the slow weights, so that they are never rounded; a third tensor
    then keeps the fast weights while the parameter holds the slow ones.

    Args:
        optimizer: The optimizer.
        settings: ``slow_dtype`` and ``slow_device`` of the counterparts.
        exclude: Parameters to leave out.
        shared: Parameters that another optimizer moves, too: its moves are training, not writes from outside.

    Attributes:
        active: The set that the parameters hold.
        outer_momentum: The momentum of the slow weights, which goes where they go.
        dtype: ``slow_dtype`` as a torch dtype.
        two_sets: Whether there are two sets: before the first cycle there is one.
        idle: Trained parameters without a gradient in the optimizer's steps since their last sync.
    """

    def __init__(
        self, optimizer: Optimizer, settings: Settings, exclude: Iterable[Tensor] = (), shared: Iterable[Tensor] = ()
    ) -> None:
        self._counterparts: dict[Tensor, Tensor] = {}
        self._offload = Offload()
        self.outer_momentum = MomentumBuffers(settings)
        self.active: Weights = "fast"
        self._aside: dict[Tensor, Tensor] = {}  # fast weights of parameters that are apart and hold the slow ones
        self._two: set[Tensor] = set()  # parameters whose sets differ right after a sync
        self._optimizer = optimizer
        self._exclude = set(exclude)
        # Where a sync copies theta to phi, a move by another optimizer belongs to both sets.
        self._shared = set() if settings.takes_theta else set(shared)
        self.dtype, self._device = dtype_of(settings.slow_dtype), device_of(settings.slow_device)
        self._listed: list[Tensor] = []
        self.two_sets = False
        self.idle: dict[Tensor, None] = {}
        self._frozen: list[Tensor] = []
        self.track()

    @property
    def counterparts(self) -> dict[Tensor, Tensor]:
        """Trained parameter -> its counterpart."""
        self._offload.wait()
        return self._counterparts

    # -- which parameters

    def track(self, also: Collection[Tensor] = ()) -> None:
        """Look at the optimizer's groups again; take in ``also``, even if they need no gradient."""
        self._listed, self._groups = parameters_of(self._optimizer), len(self._optimizer.param_groups)
        by_storage = {storage_key(parameter): parameter for parameter in reversed(self._listed)}
        single = dict.fromkeys(reversed(by_storage.values()))
        known = self.counterparts
        trained = [p for p in single if (p in known or p.requires_grad or p in also) and p not in self._exclude]
        new = [parameter for parameter in trained if parameter not in known]
        every = {**known, **dict(zip(new, self._counterparts_of(new), strict=True))}
        self._counterparts = {parameter: every[parameter] for parameter in trained}
        self._frozen = [p for p in single if p not in self._counterparts and p not in self._exclude]
        self.idle = dict.fromkeys(
            parameter for parameter in trained if parameter in self.idle or parameter not in known
        )
        self.outer_momentum.keep(self._counterparts)

    @property
    def has_new(self) -> bool:
        """Whether there is a new group, or a parameter that was frozen and is not now.

        Only frozen parameters are asked, one by one: nothing tells when a parameter is unfrozen.
        """
        if len(self._optimizer.param_groups) != self._groups:
            return True
        return bool(self._frozen) and any(map(_NEEDS_GRADIENT, self._frozen))

    def track_replaced(self) -> None:
        """Take in parameters that were put into a group, or taken out of one, and new ones."""
        listed = parameters_of(self._optimizer)
        if len(listed) != len(self._listed) or any(map(operator.is_not, self._listed, listed)) or self.has_new:
            self.track()

    def note_gradients(self) -> None:
        """Take parameters with a gradient out of `idle`: after the first step of a cycle few are left to ask.

        A parameter without a piece on this rank counts as moved: FSDP1 shows no gradient of it.
        """
        if self.idle:
            self.idle = {parameter: None for parameter in self.idle if parameter.grad is None and parameter.numel()}

    # -- where the counterparts are

    @torch.inference_mode(mode=False)
    def _counterparts_of(self, parameters: list[Tensor]) -> list[Tensor]:
        made = [copy.to(self._device, slow_dtype(copy.dtype, self.dtype)) for copy in copies(parameters)]
        offloaded = self._device is not None and self._device.type == "cpu"
        return [
            counterpart.pin_memory() if offloaded and parameter.is_cuda else counterpart
            for parameter, counterpart in zip(parameters, made, strict=True)
        ]

    def is_apart(self, parameter: Tensor) -> bool:
        """Whether a parameter's counterpart has another dtype or device."""
        counterpart = self.counterparts[parameter]
        return counterpart.dtype != parameter.dtype or counterpart.device != parameter.device

    def move_to_parameters(self) -> None:
        """Move the counterparts to the parameters' device, unless ``slow_device`` is given."""
        if self._device is None and any(p.device != other.device for p, other in self.counterparts.items()):
            self._counterparts = {p: other.to(p.device) for p, other in self.counterparts.items()}
            self._aside = {p: fast.to(p.device) for p, fast in self._aside.items()}
            self.outer_momentum.follow(self._counterparts)

    def prepare(self) -> None:
        """Begin to copy offloaded slow weights to the GPU: a sync comes after the next step."""
        self._offload.fetch(self._offloaded([*self._counterparts.items(), *self.outer_momentum.b.items()]))

    @contextmanager
    def at_hand(self, moving: Moving) -> Iterator[Moving]:
        """Let offloaded slow weights be on their fast weights' device inside the ``with`` block."""
        momentum = moving.outer_momentum
        kept = [*zip(moving.fast, moving.slow, strict=True)]
        kept += zip(moving.fast, momentum.b, strict=True) if momentum else ()
        taken = self._offload.take(self._offloaded(kept))
        if not taken:
            yield moving
            return
        beside = replace(momentum, b=[taken.get(b, b) for b in momentum.b]) if momentum else None
        yield Moving(moving.fast, [taken.get(phi, phi) for phi in moving.slow], beside)
        self._offload.store(taken)

    def _offloaded(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if self._device is None:
            return []
        return [(theta, kept) for theta, kept in pairs if theta.is_cuda and not kept.is_cuda]

    # -- either set

    def start(self) -> None:
        """Let phi be theta, without momentum."""
        self._offload.forget()
        self.outer_momentum.b = {}
        copy_(self.counterparts.values(), self.counterparts)

    def end_swap(self) -> None:
        """Take what the parameters hold for the fast weights: a state was loaded."""
        self.active, self._aside, self.two_sets = "fast", {}, False
        self._offload.forget()

    def values(self, weights: Weights) -> dict[Tensor, Tensor]:
        """Each trained parameter and its value in ``weights``: live tensors, not copies."""
        check_weights(weights)
        others = self.counterparts
        if weights == "fast":
            return {p: p for p in others} if self.active == "fast" or not self.two_sets else {**others, **self._aside}
        held = set() if self.active == "fast" else others.keys() - self._aside.keys()
        if not self.two_sets:  # there is one set, which a counterpart of lower precision cannot hold
            held = {p for p, other in others.items() if torch.promote_types(p.dtype, other.dtype) != other.dtype}
        return {p: p if p in held else other for p, other in others.items()}

    @torch.inference_mode(mode=False)  # in which Lightning validates; the counterparts outlive it
    def swap_to(self, weights: Weights, *, synced: bool = False) -> None:
        """Let all parameters hold ``weights``, or none if memory runs out.

        Args:
            weights: The set that they hold then.
            synced: Whether no step was taken since the last sync: a write from outside then belongs to both sets.
        """
        check_weights(weights)
        if weights == self.active or not self.two_sets:
            self.active = weights
            return
        aside: dict[Tensor, Tensor] = {}
        apart = self._aside  # apart at the swap to slow: the module may have moved to the counterparts' device since
        if weights == "slow":
            apart = {p: phi for p, phi in self.counterparts.items() if self.is_apart(p)}
            aside = {p: p.detach().to(self._device, copy=True) for p in apart}
        together = {p: other for p, other in self.counterparts.items() if p not in apart}
        if synced:  # the sets of most parameters are equal
            if weights == "slow":
                two = self._two = self.adopt(self._shared)
            else:
                two, self._two = self._two, set()
                self.adopt(two)
            together = {p: other for p, other in together.items() if p in two}
            apart = {p: value for p, value in apart.items() if p in two}
        exchange_(together, together.values())
        copy_(apart, apart.values())
        self._aside = aside
        self.active = weights

    def adopt(self, except_for: Collection[Tensor] | None = None) -> set[Tensor]:
        """Right after a sync, let both sets be what the parameters hold: others may have written to them.

        Args:
            except_for: Parameters that keep two sets; by default the shared ones.

        Returns:
            The parameters whose sets differ still. A parameter that is NaN or infinite keeps its slow weight.
        """
        except_for = self._shared if except_for is None else except_for
        unlike = {p: other for p, other in self.counterparts.items() if not equal(p, other.to(p))}
        two = {p for p in unlike if p in except_for or not_finite([p])}
        written = {p: other for p, other in unlike.items() if p not in two}
        copy_(written.values(), written)
        return two

    def end_cycle(self, weights: dict[Tensor, Tensor], still: dict[Tensor, Tensor]) -> None:
        """After a sync: no parameter of ``weights`` has had a gradient in the next cycle.

        No step has moved the ``still`` ones: what they hold was written from outside, and belongs to both sets. Those
        that are frozen lose their momentum.
        """
        if still:
            copy_(still.values(), still)
            self.outer_momentum.forget(parameter for parameter in still if not parameter.requires_grad)
        self.idle.update(dict.fromkeys(weights))

    def distance(self) -> Tensor:
        """The Euclidean distance of theta and phi: a 0-dim tensor on the parameters' device."""
        return distance(self.counterparts, self.counterparts.values())

    def fingerprint(self, module: nn.Module | None) -> list[int]:
        """Sums over the bits of both sets on this rank, and the number of trained parameters in the module.

        It changes if a weight of either set changes, or if the module gets other parameters.
        """
        sums = []
        for weights in OTHER:
            values = {p: p for p in self.counterparts} if weights == self.active else self.values(weights)
            sums += [bit_sum(*local([value.to(p)])) for p, value in values.items()]
        own = set(module.parameters()) if module is not None else set()
        together = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []  # one wait for it
        return [*together, len(own & self.counterparts.keys())]
