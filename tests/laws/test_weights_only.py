"""What a checkpoint holds is read without unpickling objects: each set in its place, whatever is in the module then."""

import pytest
import torch

from lightning_lookahead import LookaheadCallback, load_weights
from tests.cases import CASES
from tests.helpers.modes import At, fit, held, options_of, shown
from tests.helpers.random_networks import same


def rounded(values, like):
    """Slow weights that are kept with more digits, as the module holds them."""
    return {name: value.to(like[name].dtype) for name, value in values.items()}


@pytest.mark.parametrize("name", CASES)
def test_both_sets_are_in_their_places_also_within_a_swap(name):
    callback = LookaheadCallback(**options_of(name))
    evaluated = callback.eval_weights

    def save(trainer, module):
        sets = held(callback, module)
        for inside in ("fast", "slow"):
            with callback.use_weights(inside):
                trainer.save_checkpoint("whole.ckpt")
                trainer.save_checkpoint("light.ckpt", weights_only=True)
            whole, light = (torch.load(path, weights_only=True) for path in ("whole.ckpt", "light.ckpt"))
            same(dict(whole["state_dict"]), sets[evaluated], "state_dict")
            same(dict(light["state_dict"]), sets[evaluated], "state_dict of weights only")
            assert "optimizer_states" not in light
            for weights in ("fast", "slow"):
                found = load_weights("whole.ckpt", weights)
                same(rounded(found, sets[weights]), sets[weights], f"{weights}, saved with {inside}")
        saved.append(trainer.global_step)

    saved = []
    fit(name, callback, At(save, batch=5))
    assert saved


@pytest.mark.parametrize("name", CASES)
def test_the_end_of_a_fit_is_saved_as_it_is(name):
    callback = LookaheadCallback(**options_of(name))
    trainer, module = fit(name, callback)
    trainer.save_checkpoint("end.ckpt")
    for weights in ("fast", "slow"):
        expected = shown(callback, module, weights)
        same(rounded(load_weights("end.ckpt", weights), expected), expected, weights)
