"""The run is Algorithm 1 bit for bit, with what the mode adds to it."""

import pytest

from lightning_lookahead import AdaptiveAlpha
from tests.cases import CASES
from tests.helpers.modes import At, lookahead, naive
from tests.helpers.random_networks import same


@pytest.mark.parametrize("name", CASES)
def test_a_fit_is_that_of_a_naive_callback(name):
    alphas = []

    def note(trainer, _):
        (slow,) = trainer.callbacks[0].slow_weights
        alphas.extend([slow.alpha.last] if slow.syncs > len(alphas) else [])

    adaptive = isinstance(CASES[name].options.get("alpha"), AdaptiveAlpha)  # the naive one takes what was found
    ours = lookahead(name, *([At(note)] if adaptive else []))
    expected = naive(name, alphas if adaptive else None)
    same(ours, expected, name)
    assert len(alphas) == (3 if adaptive else 0)
