"""BatchNorm's statistics that a sync moves as it does weights."""

import pytest
import torch

from lightning_lookahead import LookaheadCallback, SlowWeights, load_weights
from tests.helpers.classifier import Normed, both_with_statistics, normed
from tests.helpers.problem import Problem
from tests.helpers.runs import equal, fit


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_statistics_can_move_as_weights_do(steps):
    callback = LookaheadCallback(k=3, buffers="sync")
    model, trainer = fit(callback, Normed(), max_steps=steps, limit_val_batches=1, val_check_interval=2)
    for ours, expected in zip(both_with_statistics(callback, model), normed(steps), strict=True):
        assert equal(ours, expected)
    assert model.net[1].num_batches_tracked == steps
    trainer.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_mean"], normed(steps)[1][-2])
    plain = fit(LookaheadCallback(k=3), Normed(), max_steps=steps)[0]
    assert not equal(plain.statistics(), model.statistics())


def test_without_statistics_there_is_nothing_to_move():
    with pytest.raises(ValueError, match="buffers='sync' has nothing to do: Regression has no BatchNorm"):
        fit(LookaheadCallback(buffers="sync"))
    with pytest.raises(ValueError, match="no module was given"):
        SlowWeights(Problem().optimizer, buffers="sync")


def test_either_set_of_statistics_comes_out_of_a_file():
    callback = LookaheadCallback(k=3, buffers="sync")
    model, trainer = fit(callback, Normed(), max_steps=5)
    trainer.save_checkpoint("end.ckpt")
    for weights, expected in zip(("fast", "slow"), both_with_statistics(callback, model), strict=True):
        loaded = load_weights("end.ckpt", weights)
        assert torch.equal(loaded["net.1.running_mean"], expected[-2])
        assert torch.equal(loaded["net.1.running_var"], expected[-1])
