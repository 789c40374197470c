"""A fit in which a weight becomes infinite or no number."""

import pytest
import torch

from lightning_lookahead import LookaheadCallback
from tests.helpers.classifier import Normed, both_with_statistics
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, both, equal, fit, reference


class Exploding(Regression):
    """One weight becomes no number, or infinite, in the second step of the second cycle."""

    value = float("nan")

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            with torch.no_grad():
                self.net[2].weight[0, 1] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_raises_with_its_name_and_phi_is_kept(value):
    callback, module = LookaheadCallback(k=3), Exploding(batches=12)
    module.value = value
    with pytest.raises(RuntimeError, match=r"'net.\d.weight' has a value that is NaN or infinite.*nonfinite='skip'"):
        fit(callback, module)
    with callback.use_weights("slow"):
        assert equal(module.weights(), reference(3)[1])


def test_restore_puts_the_weights_of_the_last_sync_back_and_training_goes_on():
    callback = LookaheadCallback(k=3, nonfinite="restore")
    with pytest.warns(UserWarning, match="Lookahead: Parameter 'net.0.weight' .* nonfinite='restore', no sync"):
        module, _ = fit(callback, Exploding(batches=12), max_steps=6)
    assert equal(both(callback, module)[0], reference(3)[1])
    assert equal(both(callback, module)[1], reference(3)[1])
    assert callback.slow_weights[0].syncs == 1
    assert callback.slow_weights[0].cycles.steps_since_sync == 0
    with pytest.warns(UserWarning, match="no sync"):
        module, _ = fit(callback, Exploding(batches=12), max_steps=11)
    other = Regression()
    with torch.no_grad():
        for parameter, value in zip(other.net.parameters(), reference(3)[1], strict=True):
            parameter.copy_(value)
    optimizer = other.configure_optimizers()  # a new one, without what made the weights infinite

    def inner_step(index):
        optimizer.zero_grad()
        other.loss(6 + index).backward()
        optimizer.step()

    phi = lookahead(list(other.net.parameters()), inner_step, k=3, alpha=0.5, steps=5)
    assert equal(both(callback, module)[0], other.weights())
    assert equal(both(callback, module)[1], phi)


def test_skip_leaves_both_sets_alone_and_waits_for_the_next_cycle():
    callback = LookaheadCallback(k=3, nonfinite="skip")
    with pytest.warns(UserWarning, match="nonfinite='skip'"):
        module, _ = fit(callback, Exploding(batches=12), max_steps=8)
    theta, phi = both(callback, module)
    assert equal(phi, reference(3)[1])
    assert not all(value.isfinite().all() for value in theta)
    assert callback.slow_weights[0].syncs == 1
    assert callback.slow_weights[0].cycles.steps_since_sync == 2


def test_statistics_that_are_no_numbers_do_not_reach_the_slow_ones():
    class Bursting(Normed):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                with torch.no_grad():
                    self(torch.full((8, 4), float("inf")))
                    next(self.parameters()).fill_(float("nan"))
            return super().training_step(batch, batch_idx)

    callback = LookaheadCallback(k=3, buffers="sync", nonfinite="restore")
    with pytest.warns(UserWarning, match="no sync"):
        model, _ = fit(callback, Bursting(), max_steps=8)
    for own in both_with_statistics(callback, model):
        assert all(value.isfinite().all() for value in own)
