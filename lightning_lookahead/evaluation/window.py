"""When the monitor evaluates: arithmetic on inner steps and syncs."""

from __future__ import annotations


class Window:
    """A number of consecutive inner steps and the syncs among them; once, or again and again.

    A window that begins after step ``s`` has the inner steps ``s + 1`` to ``s + updates``, the syncs after them, and a
    sync after step ``s`` itself.

    Args:
        updates: Inner steps in a window.
        start: Inner steps before the first window; ``None``: it begins with training.
        every_n_syncs: Syncs from the beginning of a window to that of the next; ``None``: there is one only.
    """

    def __init__(self, updates: int, start: int | None, every_n_syncs: int | None) -> None:
        self._updates = updates
        self._every_n_syncs = every_n_syncs
        self.begins = start
        self._syncs: int | None = None  # syncs when the window began
        self.finished: range | None = None
        """The steps of a window that is over, until the monitor has drawn it."""

    def begin(self, step: int, syncs: int) -> None:
        """Note that training begins or goes on after ``step`` inner steps."""
        if self.begins is None:
            self.begins, self._syncs = step, syncs

    def observe_step(self, step: int, syncs: int) -> bool:
        """Whether this inner step belongs to a window; ``syncs`` are those before it."""
        if self._syncs is None and step > self._first:
            self._syncs = syncs
        if step == self._last:
            self.finished = self.steps
        return self._first < step <= self._last

    def observe_sync(self, step: int, syncs: int) -> bool:
        """Whether the sync after this inner step belongs to a window, which may begin there; ``syncs`` include it."""
        over = self._syncs is not None and step >= self._last
        if over and self._every_n_syncs is not None and syncs - (self._syncs or 0) >= self._every_n_syncs:
            self.begins, self._syncs = step, syncs
        return self._first <= step <= self._last

    @property
    def steps(self) -> range:
        """The steps of the window that is open, to come or the last one, and the step before them."""
        return range(self._first, self._last + 1)

    def is_open(self, step: int) -> bool:
        """Whether the window has begun and more of its steps come after this one."""
        return self._first < step < self._last

    def is_over(self, step: int) -> bool:
        """Whether the window has ended and no other follows."""
        return step >= self._last and self._every_n_syncs is None

    def state_dict(self) -> dict[str, int | None]:
        """Where the window began."""
        return {"begins": self.begins, "syncs": self._syncs}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        """Go on with the window of a run that was saved."""
        self.begins, self._syncs = state_dict["begins"], state_dict["syncs"]

    @property
    def _first(self) -> int:
        return self.begins or 0

    @property
    def _last(self) -> int:
        return self._first + self._updates
