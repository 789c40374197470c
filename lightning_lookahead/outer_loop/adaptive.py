"""`AdaptiveAlpha`: the step size that Proposition 1 calls optimal, estimated at each sync."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import distributed

from lightning_lookahead._arguments import check_alpha, check_choice

from .tensors import copies, copy_

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.optim import Optimizer

Curvature = Literal["fisher", "sqrt_fisher", "secant", "hvp"]
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")


Loss = Callable[[], "Tensor"]


@dataclass
class TrainingLoss:
    """The training loss at the weights that the parameters hold.

    Attributes:
        value: Computes the loss, with a graph.
        around: A context in which ``value`` and its backward leave no trace.
    """

    value: Loss
    around: Callable[[], AbstractContextManager[None]] = nullcontext


class AdaptiveAlpha:
    """An ``alpha`` for each sync: where along the way from phi to theta a quadratic model of the loss is lowest.

    With ``d = theta - phi``, ``g`` a gradient at theta and ``A`` the curvature, ``alpha = 1 - g·d / (d·A d)``, at least
    ``alpha_low`` and at most 1. Where the loss is not curved upwards along ``d``, alpha is 1 if the loss
    falls towards theta, and ``alpha_low`` if it rises. ``curvature`` says where ``g`` and ``A`` come from. Each takes a
    temporary copy of the weights at a sync, and some take passes over the last batch:

    - ``"fisher"``: ``g`` is the k-th step's gradient, which belongs to the weights before that step; ``A`` is the
      optimizer's second moments. No pass.
    - ``"sqrt_fisher"``: ``g`` is the k-th step's gradient; ``A`` is the square root of the second moments. No pass.
    - ``"secant"``: ``g`` is the gradient of the last batch's loss at theta; ``A d`` is ``g`` minus the gradient at phi.
      Two forward and backward passes.
    - ``"hvp"``: ``g`` is the gradient of the last batch's loss at theta; ``A d`` is its derivative along ``d``. A
      forward and two backward passes.

    Under DDP ``"secant"`` and ``"hvp"`` average over the ranks' losses, by a collective of two numbers.

    ``"secant"`` and ``"hvp"`` are exact on a quadratic. Second moments are small beside the curvature: with
    ``"fisher"`` the bounds decide more often than not. The paper found no gain in generalization over a fixed alpha.

    Args:
        curvature: ``"secant"`` and ``"hvp"`` need automatic optimization or ``SlowWeights(loss=...)``. ``"fisher"`` and
            ``"sqrt_fisher"`` need an optimizer that keeps second moments (Adam, RMSprop, Adagrad).
        alpha_low: The least alpha, in (0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_lookahead import SlowWeights
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> def loss():
        ...     return (torch.tensor([4.0, 1.0]) * weight**2).sum() / 2
        >>> optimizer = torch.optim.SGD([weight], lr=0.4)  # overshoots along the first axis
        >>> slow = SlowWeights(optimizer, k=1, alpha=AdaptiveAlpha("secant"), loss=loss)
        >>> loss().backward()
        >>> _ = optimizer.step()
        >>> round(slow.alpha.last, 3)
        0.654

    Source: Zhang, Lucas, Hinton, Ba 2019, Proposition 1 and section 3.1, adaptive alpha.
    """

    def __init__(
        self,
        curvature: Curvature = "secant",
        alpha_low: float = 0.1,
    ) -> None:
        check_choice("curvature", curvature, get_args(Curvature))
        self.curvature = curvature
        self.alpha_low = check_alpha(alpha_low, "alpha_low")

    def __repr__(self) -> str:
        return f"AdaptiveAlpha(curvature={self.curvature!r}, alpha_low={self.alpha_low})"

    @property
    def needs_loss(self) -> bool:
        """Whether the estimate computes gradients of the training loss."""
        return self.curvature in {"secant", "hvp"}

    def check(self, names: set[str], optimizer: Optimizer) -> None:
        """Raise if second moments are needed and ``names``, the entries of the optimizer's state, have none."""
        if not self.needs_loss and names.isdisjoint(_SECOND_MOMENTS):
            message = (
                f"curvature={self.curvature!r} needs an optimizer that keeps second moments, and"
                f" {type(optimizer).__name__} as it is set keeps none: take 'secant' or 'hvp'."
            )
            raise ValueError(message)

    def step_size(
        self,
        optimizer: Optimizer,
        weights: dict[Tensor, Tensor],
        loss: TrainingLoss | None,
        *,
        reduce: bool,
    ) -> float:
        """The step size of a sync.

        Args:
            optimizer: The inner optimizer.
            weights: theta -> phi, for the parameters that sync.
            loss: The training loss.
            reduce: Whether to average over ranks: under DDP each rank has the loss of its own batch.
        """
        fast = list(weights)
        with torch.no_grad():
            way = [theta.to(phi) - phi for theta, phi in weights.items()]
        if self.needs_loss:
            assert loss is not None  # noqa: S101 (checked when it was made)
            products = self._from_loss(weights, way, loss)
        else:
            products = self._from_state(optimizer, fast, way)
        products = products.to(fast[0].device)
        if reduce:
            distributed.all_reduce(products)
            products /= distributed.get_world_size()
        slope, bend = products.tolist()  # g·d and d·A d
        if not bend > 0:
            return 1.0 if slope < 0 else self.alpha_low
        return float(min(max(1 - slope / bend, self.alpha_low), 1.0))

    def _from_loss(self, weights: dict[Tensor, Tensor], way: list[Tensor], loss: TrainingLoss) -> Tensor:
        fast = list(weights)
        with loss.around(), torch.enable_grad():
            gradients = torch.autograd.grad(loss.value(), fast, create_graph=self.curvature == "hvp", allow_unused=True)
            slope = _dot(gradients, way)
            if self.curvature == "hvp":
                straight = not slope.requires_grad  # a loss that is linear
                bend = _dot([] if straight else torch.autograd.grad(slope, fast, allow_unused=True), way)
        if self.curvature == "secant":
            with _at(weights), loss.around(), torch.enable_grad():
                bend = slope - _dot(torch.autograd.grad(loss.value(), fast, allow_unused=True), way)
        return torch.stack([slope, bend]).detach()

    @torch.no_grad()
    def _from_state(self, optimizer: Optimizer, fast: list[Tensor], way: list[Tensor]) -> Tensor:
        slope = _dot([parameter.grad for parameter in fast], way)
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        seconds = [_second_moment(optimizer.state.get(p, {}), groups[p]) for p in fast]
        squares = [d * d for d in way]
        bends = [
            second.sqrt() if self.curvature == "sqrt_fisher" and second is not None else second for second in seconds
        ]
        return torch.stack([slope, _dot(bends, squares)])


@contextmanager
def _at(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Let each parameter hold its value in ``values`` inside the ``with`` block."""
    before = copies(values)
    copy_(values, values.values())
    try:
        yield
    finally:
        copy_(values, before)


def _dot(left: Any, right: list[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, in at least float32; ``None`` is zero."""
    total = torch.zeros((), dtype=torch.promote_types(right[0].dtype, torch.float32), device=right[0].device)
    for a, b in zip(left, right, strict=bool(left)):
        if a is not None:
            total = total + (a.to(b) * b).sum().to(total)
    return total


def _second_moment(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor | None:
    """The mean square of a parameter's gradients, as the optimizer keeps it, without the bias of its start."""
    if "exp_avg_sq" in state:
        step = float(state["step"]) if "step" in state else 0.0
        return state["exp_avg_sq"] / (1 - group["betas"][1] ** step) if step else state["exp_avg_sq"]
    if "square_avg" in state:
        return state["square_avg"]
    if "sum" in state:
        return state["sum"] / max(float(state["step"]), 1.0)
    return None
