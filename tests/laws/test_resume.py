"""Stopped after any batch, a run goes on in a new process as the uninterrupted run, bit for bit."""

import pytest

from tests.cases import CASES
from tests.helpers.modes import every_step, lookahead, saved
from tests.helpers.random_networks import same


def go_on_from_each(name, whole):
    """In a process that has not trained: from each checkpoint here to the end."""
    paths = saved(".")
    for path in paths:
        same(lookahead(name, ckpt_path=path), whole, f"{name}, from {path}")
    return len(paths)


@pytest.mark.parametrize("name", CASES)
def test_resumed_in_a_new_process_the_run_is_the_uninterrupted_one(name, ranks):
    assert ranks(1, go_on_from_each, name, lookahead(name, every_step("."))) == [10]
