"""Counting inner steps: the calls of ``optimizer.step()`` that moved weights, or all that were attempted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

from .sharding import BackwardSeen

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .parameters import Parameters


def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether the step that begins is a rehearsal of ``torch.distributed.checkpoint``.

    Before it reads or writes an empty state it takes a step with gradients and learning rates of zero, so that the
    optimizer creates its state. A real step may have a learning rate of zero, too (warm-up): the stack tells them
    apart.
    """
    lr = optimizer.param_groups[0].get("lr")
    if not isinstance(lr, Tensor) and lr != 0:
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class InnerSteps:
    """Counts the real steps of one optimizer.

    A step does not count if no parameter had a gradient (Lightning calls ``step()`` all the same when
    ``training_step`` returned None) or if a gradient scaler skipped it. With ``attempts`` it counts all the same.

    Attributes:
        attempting: Whether a step is under way that counts even if ``optimizer.step()`` is never called in it.
    """

    def __init__(self, optimizer: Optimizer, parameters: Parameters, *, attempts: bool = False) -> None:
        self._optimizer = optimizer
        self._total = 0
        self._skipped: Tensor | None = None  # skipped inside fused kernels: summed on the device, not read yet
        self._depth = 0
        self._attempts, self.attempting = attempts, False
        self._moves = False
        self._backward = BackwardSeen.where_needed(parameters.module, parameters.listed)

    @property
    def has_gradient(self) -> bool:
        """Whether a parameter has a gradient."""
        if self._backward is not None:
            return self._backward.since_last
        groups = self._optimizer.param_groups  # the first that has one ends it: no list is made in each step
        return any(parameter.grad is not None for group in groups for parameter in group["params"])

    def begin(self, *, moves: bool) -> bool:
        """Note that ``optimizer.step()`` begins; return whether no other call of it is under way.

        A subclass that calls ``super().step()`` fires the hooks of both classes. It is one step, which ends when the
        outermost call does.

        Args:
            moves: Whether parameters have their gradients already; ``False`` if a closure is to compute them.
        """
        if self._depth:
            self._depth = self._calls_under_way() - 1 + self.attempting  # a call that raised has not ended
        self._depth += 1
        if self._depth == 1:
            self._moves = moves
        return self._depth == 1

    def _calls_under_way(self) -> int:
        """How many calls of ``optimizer.step()`` are on the stack: torch wraps each in a function for its hooks."""
        calls, frame = 0, sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is self._optimizer:
                calls += 1
            frame = frame.f_back  # type: ignore[assignment]
        return calls

    def end(self) -> bool:
        """Note that ``optimizer.step()`` ends; count the step if it moved weights, and return whether it did."""
        self._depth = max(self._depth - 1, 0)
        self._moves = self._moves or self.has_gradient  # an inner call may clear its gradients
        if self._backward is not None:
            self._backward.since_last = False
        if self._depth or not (self._moves or self._attempts):
            return False
        self._moves = False
        self._total += 1
        if self._attempts:
            return True
        # A fused optimizer skips inside its kernel. The flag stays on the device: reading it here would wait.
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None:
            skipped = (found_inf > 0).to(found_inf.dtype)
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        return True

    @property
    def under_way(self) -> bool:
        """Whether a call of ``optimizer.step()`` has not ended yet."""
        return self._depth > 0

    @property
    def counted(self) -> int:
        """Inner steps so far, an upper bound: a fused kernel may have skipped some. Reads nothing from the device."""
        return self._total

    @property
    def total(self) -> int:
        """Inner steps so far. Reads one number from the device if a fused optimizer and a scaler are used."""
        if self._skipped is not None:
            self._total -= int(self._skipped.item())
            self._skipped = None
        return self._total

    def reached(self, number: int) -> bool:
        """Whether ``number`` inner steps were taken; reads the device only if `counted` says so."""
        return self._total >= number and self.total >= number

    def restore(self, total: int) -> None:
        """Go on from a saved count."""
        self._skipped = None
        self._total = total

    def close(self) -> None:
        """Remove the hooks on parameters."""
        if self._backward is not None:
            self._backward.close()
