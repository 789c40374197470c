"""Runs with a checkpoint after every step, and runs that go on from each."""

from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, both, equal, inputs, make_trainer

STEPS, K = 10, 4


class Ranked(Regression):
    """Each rank has its own data."""

    def loss(self, step):
        return (self.net(inputs(step * 7 + self.global_rank)) - 1).square().mean()


class Zero(Ranked):
    """Each rank has the optimizer's state of some of the parameters, and all parameters."""

    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.net.parameters(), optimizer_class=self.optimizer_class, **self.settings)


def module_for(optimizer, strategy):
    return Zero(optimizer) if strategy == "zero" else Ranked(optimizer)


def trainer_for(*callbacks):
    return make_trainer(
        *callbacks, max_steps=STEPS, limit_val_batches=1, val_check_interval=3, strategy="ddp", devices=2
    )


def train(optimizer, strategy, eval_weights):
    """Save a checkpoint after every step; return both sets of weights at the end."""
    callback, module = LookaheadCallback(k=K, eval_weights=eval_weights), module_for(optimizer, strategy)
    every = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    trainer_for(callback, every).fit(module)
    return both(callback, module)


def resume(optimizer, strategy, eval_weights, theta, phi):
    """Go on from each checkpoint; the end has to be this one."""
    for step in range(1, STEPS + 1):
        callback, module = LookaheadCallback(k=K, eval_weights=eval_weights), module_for(optimizer, strategy)
        trainer = trainer_for(callback)
        trainer.fit(module, ckpt_path=f"step={step}.ckpt")
        assert trainer.global_step == STEPS
        assert equal(both(callback, module)[0], theta), f"theta differs when resumed from step {step}"
        assert equal(both(callback, module)[1], phi), f"phi differs when resumed from step {step}"
        assert (callback.slow_weights[0].steps, callback.slow_weights[0].syncs) == (STEPS, STEPS // K)
