"""Where Lookahead begins and ends: a late start, a last cycle that is not finished, syncs by hand."""

import pytest

from lightning_lookahead import LookaheadCallback
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, both, equal, fit, make_trainer, reference


def started_late(steps, start, k=3):
    """theta and phi of plain steps up to ``start`` and Algorithm 1 from there on."""
    module = Regression()
    optimizer = module.configure_optimizers()

    def inner_step(index):
        optimizer.zero_grad()
        module.loss(index).backward()
        optimizer.step()

    for index in range(min(start, steps)):
        inner_step(index)
    phi = lookahead(
        list(module.net.parameters()), lambda i: inner_step(start + i), k=k, alpha=0.5, steps=max(steps - start, 0)
    )
    return module.weights(), phi


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_the_first_cycle_begins_at_start_step_from_the_weights_of_that_moment(start):
    callback = LookaheadCallback(k=3, start_step=start)
    module, trainer = fit(callback)
    theta, phi = started_late(8, start)
    assert equal(both(callback, module)[0], theta)
    assert equal(both(callback, module)[1], phi)
    assert callback.slow_weights[0].syncs == (8 - start) // 3
    assert callback.slow_weights[0].steps == 8
    trainer.save_checkpoint("end.ckpt")


def test_before_it_there_is_one_set_of_weights_which_validation_sees():
    seen = []

    class Watching(Regression):
        def on_validation_start(self):
            seen.append(self.weights())

    callback = LookaheadCallback(k=3, start_step=20)
    module, _ = fit(callback, Watching(batches=12), val_check_interval=2, limit_val_batches=1)
    for index, steps in enumerate((2, 4, 6, 8)):
        assert equal(seen[index], started_late(steps, 20)[0])
    assert equal(*both(callback, module))


def test_sync_now_syncs_all_and_only_within_a_fit():
    class Asking(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                callback.sync_now()

    callback = LookaheadCallback(k=3)
    with pytest.raises(RuntimeError, match=r"sync_now\(\) was called outside of a fit"):
        callback.sync_now()
    fit(callback, Asking(batches=12))
    assert callback.slow_weights[0].syncs == 3  # after steps 3, 4 and 7
    with pytest.raises(RuntimeError, match="outside of a fit"):
        callback.sync_now()


def test_sync_now_has_nothing_to_do_without_an_optimizer_and_something_before_the_first_step():
    class Asking(Regression):
        def on_train_start(self):
            callback.sync_now()

        def on_validation_epoch_start(self):
            callback.sync_now()

    callback = LookaheadCallback(k=3, eval_weights="fast")
    make_trainer(callback, max_steps=2, num_sanity_val_steps=1, limit_val_batches=1).fit(Asking(batches=2))
    assert callback.slow_weights[0].syncs == 3  # in the sanity check, at the start, and in the validation
    module = Asking(batches=2)
    module.configure_optimizers = lambda: None
    with pytest.warns(UserWarning, match="nothing to look ahead with"), pytest.raises(RuntimeError, match="outside of"):
        make_trainer(callback, max_steps=2, num_sanity_val_steps=1).fit(module)


@pytest.mark.parametrize("steps", [6, 8])
def test_an_unfinished_cycle_is_dropped_or_synced(steps):
    dropping, syncing = LookaheadCallback(k=3), LookaheadCallback(k=3, unfinished_cycle="sync")
    theta, phi = reference(steps)
    dropped = fit(dropping, max_steps=steps)[0].weights()
    synced = fit(syncing, max_steps=steps)[0].weights()
    assert equal(dropped, phi)
    assert equal(synced, [slow.lerp(fast, 0.5) for slow, fast in zip(phi, theta, strict=True)])
    assert equal(dropped, synced) == (steps == 6)
    assert equal(*both(syncing, fit(syncing, max_steps=steps)[0]))
