"""Counting inner steps: the calls of ``optimizer.step()`` that moved weights, or all that were attempted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

from .sharding import BackwardSeen

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .parameters import Parameters


def in_rehearsal() -> bool:
    """Whether the stack has the function in which ``torch.distributed.checkpoint`` rehearses a step."""
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
        rehearsing: How many calls of ``optimizer.step()`` under way are rehearsals, perhaps within a real step. Before
            it reads or writes an empty state, ``torch.distributed.checkpoint`` takes a step with gradients and learning
            rates of zero, so that the optimizer creates its state.
    """

    def __init__(self, optimizer: Optimizer, parameters: Parameters, *, attempts: bool = False) -> None:
        self._optimizer = optimizer
        self._total = 0
        self._skipped: Tensor | None = None  # skipped inside fused kernels: summed on the device, not read yet
        self._depth = 0
        self._attempts, self.attempting = attempts, False
        self._moves = False
        self.rehearsing = 0
        self._lr: object = None  # of the last real step, if it was not zero
        self._likely: Tensor | None = None  # a parameter that had a gradient when it was last asked
        self._backward = BackwardSeen.where_needed(parameters.module, parameters.listed)

    @property
    def has_gradient(self) -> bool:
        """Whether a parameter has a gradient."""
        if self._backward is not None:
            return self._backward.since_last
        if self._likely is not None and self._likely.grad is not None:
            return True
        groups = self._optimizer.param_groups
        self._likely = next((p for group in groups for p in group["params"] if p.grad is not None), None)
        return self._likely is not None

    def look_again(self) -> None:
        """Forget which parameter had a gradient: the optimizer's parameters may be others now."""
        self._likely = None

    def begin(self, *, has_closure: bool) -> bool:
        """Note that ``optimizer.step()`` begins; return whether it is no rehearsal and no other call is under way.

        A subclass that calls ``super().step()`` fires the hooks of both classes. It is one step, which ends when the
        outermost call does.

        Args:
            has_closure: Whether a closure is to compute the gradients.
        """
        lr = self._optimizer.param_groups[0].get("lr")
        if lr is not self._lr and self._is_rehearsal(lr):
            self.rehearsing += 1
            return False
        self.rehearsing = 0  # one that raised has not ended
        if self._depth:
            self._depth = self._calls_under_way() - 1 + self.attempting  # a call that raised has not ended
        self._depth += 1
        if self._depth > 1:
            return False
        self._moves = not has_closure and self.has_gradient
        return True

    def _is_rehearsal(self, lr: object) -> bool:
        """Whether a step begins with a learning rate of zero that is not a real one (of a warm-up, say)."""
        is_tensor = isinstance(lr, Tensor)  # its value is not read, as that would wait for the device
        if (is_tensor or lr == 0) and in_rehearsal():
            return True
        self._lr = lr if is_tensor or lr != 0 else None
        return False

    def _calls_under_way(self) -> int:
        """How many calls of ``optimizer.step()`` are on the stack: torch wraps each in a function for its hooks."""
        calls, frame = 0, sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is self._optimizer:
                calls += 1
            frame = frame.f_back  # type: ignore[assignment]
        return calls

    def end(self) -> int:
        """Note that ``optimizer.step()`` ends; count the step if it moved weights.

        Returns:
            How many are `counted` with it; 0 if it does not count.
        """
        if self._depth:
            self._depth -= 1
        self._moves = self._moves or self.has_gradient  # an inner call may clear its gradients
        if self._backward is not None:
            self._backward.since_last = False
        if self._depth or not (self._moves or self._attempts):
            return 0
        self._moves = False
        self._total += 1
        if self._attempts:
            return self._total
        # A fused optimizer skips inside its kernel. The flag stays on the device: reading it here would wait.
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None:
            skipped = (found_inf > 0).to(found_inf.dtype)
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        return self._total

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
