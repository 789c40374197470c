"""The hooks on the inner optimizer: they count its steps, begin cycles and call for a sync after the k-th step."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .cycles import KeptSettings
from .names import unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from torch.optim import Optimizer

    from .cycles import Cycles
    from .persistence import Persistence
    from .settings import Settings
    from .weight_pairs import WeightPairs


class InnerLoop:
    """Watches one optimizer: begins the first cycle, counts the steps, and calls for a sync after the k-th.

    Args:
        optimizer: The inner optimizer. All hooks of this package on it are here.
        settings: ``start_step`` and ``slow_device``.
        pairs: Fast and slow weights.
        cycles: Counts of steps and syncs.
        persistence: The state that was loaded and waits for the first step.

    Attributes:
        after_each: Called after each counted step; ``None``: nobody looks.
        when_due: Called after it in the step that ends a cycle, and in each further one until a sync; ``None``: the
            caller looks whether a sync is due.
        looks_in_closure: Whether the caller looks for new parameters (`track_new`) when a closure has run.

    Raises:
        ValueError: If the optimizer is watched already.
    """

    def __init__(
        self, optimizer: Optimizer, settings: Settings, pairs: WeightPairs, cycles: Cycles, persistence: Persistence
    ) -> None:
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
        if any(isinstance(getattr(hook, "__self__", None), InnerLoop) for hook in hooks):
            message = "optimizer has slow weights already, which would pull back twice: close() them first."
            raise ValueError(message)
        self._optimizer, self._settings = optimizer, settings
        self._pairs, self._cycles, self._steps, self._persistence = pairs, cycles, cycles.steps, persistence
        self._first_step = False  # whether the step under way may begin the first cycle, or resume
        self.after_each: Callable[[], None] | None = None
        self.when_due: Callable[[], None] | None = None
        self.looks_in_closure = False
        self._early = settings.slow_device is not None  # whether there is something to do a step before a sync
        self._hooks: list[Any] = []

    # -- a step

    def _before_step(self, _: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        has_closure = len(arguments) > 1 or named.get("closure") is not None
        if not self._steps.begin(has_closure=has_closure):
            return
        if self._pairs.active == "slow":
            message = (
                "optimizer.step() was called while the parameters hold the slow weights: step after the"
                " `with ...use('slow')` block (or the validation) is left."
            )
            raise RuntimeError(message)
        self._first_step = not self._pairs.two_sets or self._persistence.pending is not None
        if self._first_step:  # a step without a closure may compute its gradients itself: then there are none yet
            self._begin(computes=has_closure or not self._steps.has_gradient)
        if not (has_closure and self.looks_in_closure):
            self.track_new()
        if not has_closure:  # a closure computes the gradients within the step
            self._pairs.note_gradients()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Count what happens inside the ``with`` block as one call of ``optimizer.step()``, if there is none, too."""
        self._steps.attempting = True
        try:
            self._before_step(self._optimizer, (), {"closure": self})
            yield
            self._after_step()
        finally:
            self._steps.attempting = False

    def _begin(self, *, computes: bool) -> None:
        """Begin or resume training: a loaded state takes its place for good.

        Args:
            computes: Whether the step computes its gradients itself, at the weights that the parameters hold then.
        """
        pending = self._persistence.pending
        if pending is not None and not computes and not pending.in_place:
            message = (
                "The model was loaded with its slow weights after SlowWeights.load_state_dict, and a step was taken"
                " at once: its gradient is not that of the fast weights. Call swap_to('fast') when all is loaded, or"
                " load SlowWeights last, or give it the module."
            )
            raise RuntimeError(message)
        begins = self._steps.reached(self._settings.start_step)
        if begins or pending is not None:
            self._persistence.place()
        if begins and not self._pairs.two_sets:  # gradients of steps before the first cycle do not count in it
            self._pairs.idle = dict.fromkeys(self._pairs.counterparts)
        self._persistence.let_go(begins=begins)

    def track_new(self) -> None:
        """Take in parameters that were added or unfrozen: phi of each starts at its value now."""
        if self._pairs.has_new:
            self._pairs.track()
            self._cycles.update(self._pairs.counterparts)

    def _after_step(self, *_: object) -> None:
        steps = self._steps
        if steps.rehearsing:
            steps.rehearsing -= 1
            return
        if self._pairs.idle:
            self._pairs.note_gradients()
        counted = steps.end()
        if not counted:
            if self._first_step and steps.counted <= self._settings.start_step and not steps.under_way:
                self._pairs.two_sets = False  # the step had no gradient: the first cycle has not begun
            return
        if self.after_each is not None:
            self.after_each()
        left = self._cycles.next_end - counted
        if left > self._early:
            return
        if left == 1:
            self._pairs.prepare()
        elif self.when_due is not None and self._cycles.ended():
            self.when_due()

    # -- hooks

    @property
    def watches(self) -> bool:
        """Whether steps are counted: from `watch` until `close`."""
        return bool(self._hooks)

    def watch(self, module: nn.Module | None) -> None:
        """Begin to watch.

        Args:
            module: A module whose loading puts a pending state in its place.
        """
        self._module = module
        optimizer, kept = self._optimizer, KeptSettings()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):  # some wrappers never call Optimizer.__init__
            self._hooks += [
                optimizer.register_load_state_dict_pre_hook(kept.before),
                optimizer.register_load_state_dict_post_hook(kept.after),
            ]
        if module is not None:
            named: Any = unwrapped(module)
            self._hooks.append(named.register_load_state_dict_post_hook(_WhenLoaded(self._persistence)))

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._steps.close()

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer leaves its hooks behind when it is copied or pickled, and so does this object.
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        watches = state["_hooks"]
        self.__dict__.update({**state, "_hooks": []})
        if watches:
            self.watch(self._module)


class _WhenLoaded:
    """Tells a `Persistence` that its module was loaded. A copy, pickled or deep, tells nobody."""

    def __init__(self, persistence: Persistence | None = None) -> None:
        self._persistence = weakref.ref(persistence) if persistence is not None else None

    def __call__(self, *_: object) -> None:
        """Put a pending state in its place."""
        persistence = self._persistence() if self._persistence is not None else None
        if persistence is not None:
            persistence.when_loaded()

    def __reduce__(self) -> tuple[Any, ...]:
        return _WhenLoaded, ()
