"""The figure shows the records: segments between syncs, dots at syncs."""

import pytest
from matplotlib import pyplot as plt

from lightning_lookahead import InnerLoop, Record, inner_loops, plot_inner_outer


def window(begin, loops, k=3):
    """A dot, then loops of k steps and a dot; the value is the step, plus a half for dots."""
    records = [Record(begin, "outer", begin + 0.5, None)]
    for loop in range(loops):
        steps = range(begin + loop * k + 1, begin + (loop + 1) * k + 1)
        records += [Record(step, "inner", float(step), None) for step in steps]
        records.append(Record(steps[-1], "outer", steps[-1] + 0.5, None))
    return records


def drawn(axes):
    *segments, dots = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.lines]
    return segments, dots


def test_segments_begin_at_a_sync_end_before_the_next_and_are_not_connected():
    (axes,) = plot_inner_outer(window(0, 2)).axes
    segments, dots = drawn(axes)
    assert segments == [([0, 1, 2, 3], [0.5, 1, 2, 3]), ([3, 4, 5, 6], [3.5, 4, 5, 6])]
    assert dots == ([0, 3, 6], [0.5, 3.5, 6.5])
    assert axes.lines[-1].get_linestyle() == "None"


def test_a_window_may_begin_and_end_within_a_loop():
    segments, dots = drawn(plot_inner_outer(window(0, 3)[2:-2]).axes[0])
    assert segments[0] == ([2, 3], [2, 3])
    assert segments[-1] == ([6, 7, 8], [6.5, 7, 8])
    assert dots[0] == [3, 6]


def test_windows_stand_side_by_side_with_labelled_axes_and_one_legend():
    figure = plot_inner_outer(window(0, 2) + window(60, 3), name="test accuracy")
    left, right = figure.axes
    assert drawn(left)[1][0] == [0, 3, 6]
    assert drawn(right)[1][0] == [60, 63, 66, 69]
    assert (left.get_ylabel(), left.get_xlabel(), right.get_xlabel()) == ("test accuracy", "inner steps", "inner steps")
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "inner loop (fast weights)",
        "slow weights, after each sync",
    ]
    assert right.get_legend() is None
    figure.savefig("figure.png")


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history is empty"):
        plot_inner_outer([])


def test_nothing_is_left_for_pyplot_to_show():
    before = plt.get_fignums()
    plot_inner_outer(window(0, 1))
    assert plt.get_fignums() == before


def test_inner_loops_are_those_that_a_window_holds_whole():
    assert inner_loops(window(0, 2)) == [InnerLoop(0.5, 3, 3.5), InnerLoop(3.5, 6, 6.5)]
    assert inner_loops(window(0, 3)[2:-2]) == [InnerLoop(3.5, 6, 6.5)]  # the first and the last are cut
    assert inner_loops(window(0, 1) + window(60, 1)) == [InnerLoop(0.5, 3, 3.5), InnerLoop(60.5, 63, 63.5)]
    assert inner_loops([]) == []


@pytest.mark.parametrize(
    ("values", "fell", "raised", "recovered"),
    [
        ((0.9, 0.8, 0.9), True, True, True),
        ((0.9, 0.8, 0.85), True, True, False),
        ((0.9, 0.8, 0.8), True, False, False),
        ((0.9, 0.95, 0.92), False, False, False),
        ((0.9, 0.9, 0.91), False, True, True),
    ],
)
def test_what_a_sync_made_of_an_inner_loop(values, fell, raised, recovered):
    loop = InnerLoop(*values)
    assert (loop.fell, loop.raised, loop.recovered) == (fell, raised, recovered)
