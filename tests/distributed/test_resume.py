"""Stop anywhere, resume in a new process: the run is the uninterrupted run, bit for bit."""

import pytest

from tests.distributed.resume_worker import resume, train
from tests.helpers.runs import equal


@pytest.mark.parametrize(
    ("optimizer", "strategy", "weights"),
    [
        ("SGD", "ddp", "slow"),
        ("Adam", "ddp", "slow"),
        ("Adam", "zero", "slow"),
    ],
)
def test_resumed_at_every_offset_in_a_new_process_the_run_is_the_uninterrupted_one(optimizer, strategy, weights, ranks):
    ends = ranks(2, train, optimizer, strategy, weights)
    for theta, phi in ends:
        assert not equal(theta, phi), "the last cycle must be unfinished, or the test shows less"
        assert equal(theta, ends[0][0])
        assert equal(phi, ends[0][1])
    ranks(2, resume, optimizer, strategy, weights, *ends[0], group="other")
