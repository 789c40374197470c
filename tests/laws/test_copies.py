"""A copy of the callback, by `copy` or by pickle, has its state and nothing of its storage."""

import copy
import functools
import pickle

import pytest
import torch

from lightning_lookahead import LookaheadCallback
from tests.cases import CASES
from tests.helpers.modes import At, fit, held, lookahead, options_of
from tests.helpers.random_networks import same


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))


def check(duplicate, trainer, _):
    """Make a copy, and spoil it: the original must not notice."""
    callback = trainer.callbacks[0]
    twin = duplicate(callback)
    for mine, its in zip(callback.slow_weights, twin.slow_weights, strict=True):
        assert its.persistence.counters() == mine.persistence.counters()
        for weights in ("slow", "fast"):
            same(list(its.values(weights).values()), list(mine.values(weights).values()), weights)
        with torch.no_grad():
            for value in (*its.values("slow").values(), *its.values("fast").values()):
                value.fill_(7.0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("name", CASES)
def test_a_copy_within_a_cycle_has_both_sets_and_one_after_the_fit_trains_the_same_run(name, duplicate):
    callback = LookaheadCallback(**options_of(name))
    _, module = fit(name, callback, At(functools.partial(check, duplicate), batch=5))
    whole = held(callback, module)
    same(whole, lookahead(name), "the run that was copied")
    twin = duplicate(callback)
    _, module = fit(name, twin)
    same(held(twin, module), whole, "the run of the copy")
