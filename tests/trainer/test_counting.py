"""Which batches hold inner steps, and how many."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, SeveralSteps, both, equal, inputs, make_trainer, reference


def test_accumulation_with_a_short_last_window_counts_optimizer_steps():
    callback, module = LookaheadCallback(k=2), Regression(batches=5)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((callback.slow_weights[0].steps, callback.slow_weights[0].syncs))

    make_trainer(callback, Watch(), max_epochs=2, accumulate_grad_batches=2).fit(module)
    # windows of 2, 2 and 1 batches; a batch that did not step does not sync a second time
    expected = [(0, 0), (1, 0), (1, 0), (2, 1), (3, 1), (3, 1), (4, 2), (4, 2), (5, 2), (6, 3)]
    assert seen == expected


def test_a_training_step_that_returns_none_is_no_inner_step():
    class Sometimes(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in {1, 2} else super().training_step(batch, batch_idx)

    callback = LookaheadCallback(k=2)
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(Sometimes())
    assert trainer.global_step == 10
    assert (callback.slow_weights[0].steps, callback.slow_weights[0].syncs) == (6, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_are_no_inner_steps(fused):
    class Overflowing(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.01, fused=fused)

    callback = LookaheadCallback(k=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = make_trainer(callback, max_epochs=2, plugins=[plugin])
    module = Overflowing()
    module.net.float()
    module.loss = lambda step: (module.net(inputs(step).float()) - 1).square().mean()
    trainer.fit(module)
    assert trainer.global_step == 10
    assert callback.slow_weights[0].steps == 8
    assert callback.slow_weights[0].syncs == 2


def test_several_steps_in_a_batch_sync_exactly_after_the_kth_and_each_optimizer_counts_for_itself():
    callback, module = LookaheadCallback(k=5), SeveralSteps(first=3)
    make_trainer(callback, max_epochs=1, limit_train_batches=4).fit(module)
    first, second = callback.slow_weights
    assert (first.steps, first.syncs, second.steps, second.syncs) == (12, 2, 4, 0)
    theta, phi = reference(12, k=5)
    assert equal(module.weights(), phi)
    assert equal(both(callback, module)[0], theta)
