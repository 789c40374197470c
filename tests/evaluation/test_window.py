"""Which steps and syncs the monitor looks at."""

import pytest

from lightning_lookahead.evaluation.window import Window


def seen(steps, k=5, first=0, **settings):
    """Steps and syncs of the windows in a run of so many steps from ``first`` on, and the windows that ended."""
    window = Window(**{"updates": 10, "start": None, "every_n_syncs": None, **settings})
    window.begin(first, first // k)
    inner, outer, finished = [], [], []
    if window.observe_sync(first, first // k):
        outer.append(first)
    for step in range(first + 1, first + steps + 1):
        if window.observe_step(step, (step - 1) // k):
            inner.append(step)
        if step % k == 0 and window.observe_sync(step, step // k):
            outer.append(step)
        if window.finished is not None:
            finished.append((window.finished[0], window.finished[-1]))
            window.finished = None
    return inner, outer, finished


def test_a_window_has_its_steps_the_syncs_among_them_and_the_one_it_begins_with():
    assert seen(40) == (list(range(1, 11)), [0, 5, 10], [(0, 10)])
    assert seen(40, start=15) == (list(range(16, 26)), [15, 20, 25], [(15, 25)])


def test_a_window_that_begins_within_a_cycle_begins_with_a_step():
    assert seen(40, start=13) == (list(range(14, 24)), [15, 20], [(13, 23)])


def test_without_a_start_the_window_begins_where_training_goes_on():
    assert seen(20, first=100) == (list(range(101, 111)), [100, 105, 110], [(100, 110)])


def test_a_window_that_training_has_passed_does_not_open():
    assert seen(20, first=100, start=0) == ([], [], [])


@pytest.mark.parametrize(
    ("every", "begins"),
    [
        (4, [0, 20, 40, 60]),
        (2, [0, 10, 20, 30, 40, 50, 60]),
        (3, [0, 15, 30, 45, 60]),
        (1, [0, 10, 20, 30, 40, 50, 60]),
    ],
)
def test_windows_repeat_every_so_many_syncs_and_never_overlap(every, begins):
    inner, outer, finished = seen(70, every_n_syncs=every)
    assert [first for first, _ in finished] == begins
    assert inner == [step for first in begins for step in range(first + 1, first + 11)]
    assert outer == sorted({step for first in begins for step in (first, first + 5, first + 10)})


def test_windows_repeat_from_a_late_start_on():
    assert [first for first, _ in seen(80, start=12, every_n_syncs=4)[2]] == [12, 30, 50, 70]


def test_a_resumed_window_is_the_uninterrupted_one():
    for stop in range(40):
        window = Window(7, 3, 3)
        window.begin(0, 0)
        resumed, whole = [], seen(40, updates=7, start=3, every_n_syncs=3)
        for step in range(1, 41):
            if step == stop:
                state, window = window.state_dict(), Window(7, 3, 3)
                window.load_state_dict(state)
                window.begin(step - 1, (step - 1) // 5)
            if window.observe_step(step, (step - 1) // 5):
                resumed.append(step)
            if step % 5 == 0:
                window.observe_sync(step, step // 5)
        assert resumed == whole[0]
