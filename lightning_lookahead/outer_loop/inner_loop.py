"""The hooks on the inner optimizer: they count its steps, begin cycles and call for a sync after the k-th step."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .cycles import KeptSettings
from .inner_steps import is_rehearsal
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
        self._hooks: list[Any] = []

    # -- a step

    def _before_step(self, _: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if is_rehearsal(self._optimizer):
            return
        has_closure = named.get("closure") is not None or len(arguments) > 1
        has_gradient = self._steps.has_gradient
        if not self._steps.begin(moves=has_gradient and not has_closure):
            return
        if self._pairs.active == "slow":
            message = (
                "optimizer.step() was called while the parameters hold the slow weights: step after the"
                " `with ...use('slow')` block (or the validation) is left."
            )
            raise RuntimeError(message)
        self._first_step = not self._pairs.two_sets or self._persistence.pending is not None
        if self._first_step:  # a step without a closure may compute its gradients itself: then there are none yet
            self._begin(computes=has_closure or not has_gradient)
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
        if self._pairs.track_new():
            self._cycles.update(self._pairs.counterparts)

    def _after_step(self, *_: object) -> None:
        if is_rehearsal(self._optimizer):
            return
        self._pairs.note_gradients()
        counted = self._steps.end()
        first = self._first_step and self._steps.counted <= self._settings.start_step
        if first and not counted and not self._steps.under_way:
            self._pairs.two_sets = False  # the step had no gradient: the first cycle has not begun
        if counted and self._settings.slow_device and self._steps.counted + 1 in {c.ends for c in self._cycles}:
            self._pairs.prepare()
        if counted and self._sync is not None and self._cycles.ended():
            self._sync()

    # -- hooks

    @property
    def watches(self) -> bool:
        """Whether steps are counted: from `watch` until `close`."""
        return bool(self._hooks)

    @property
    def attempting(self) -> bool:
        """Whether an `attempt` is under way."""
        return self._steps.attempting

    def watch(self, sync: Callable[[], None] | None, module: nn.Module | None) -> None:
        """Begin to watch.

        Args:
            sync: Called within the step that ends a cycle; ``None``: the caller syncs.
            module: A module whose loading puts a pending state in its place.
        """
        self._sync, self._module = sync, module
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
            self.watch(self._sync, self._module)


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
