"""What the monitor and `compare_weights` see on several ranks, and that they change nothing there either."""

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchmetrics import MeanSquaredError

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, compare_weights
from lightning_lookahead.evaluation.measure import Evaluation
from tests.helpers.classifier import Classifier, images
from tests.helpers.runs import equal, inputs, make_trainer
from tests.helpers.sharded import Sharded, local, strategy_for


def regress(module, batch):  # noqa: ARG001 (the data are the ranks' own)
    x = inputs(500 + dist.get_rank()).to(next(module.parameters()).dtype)
    prediction = module(x)
    return prediction, torch.ones_like(prediction), (prediction - 1).square().mean()


class Trailing(Callback):
    """Keeps the weights after every batch, so that a run can be compared with another step by step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, *_):
        self.weights += [local(parameter).detach().clone() for parameter in trainer.strategy.model.parameters()]


class Ranked(Sharded):
    """Data of its own on each rank, and a validation that draws and logs what all ranks have seen."""

    def loss(self, step):
        return super().loss(step * 7 + dist.get_rank())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().loss(1000), sync_dist=True)


def sharded(kind, monitor, steps=8, **settings):
    callback, trailing, model = LookaheadCallback(k=3, monitor=monitor), Trailing(), Ranked("SGD", kind)
    trainer = make_trainer(
        callback,
        trailing,
        strategy=strategy_for(kind),
        devices=dist.get_world_size() if dist.is_initialized() else 2,
        max_steps=steps,
        val_check_interval=2,
        **{"limit_val_batches": 1, **settings},
    )
    trainer.fit(model)
    return trainer, model, callback, trailing.weights


def monitor_of(updates=7):
    return InnerOuterMonitor(updates=updates, metric=MeanSquaredError(), step=regress)


def after_fit(trainer, model, callback, path):
    """Compare with the Trainer that has trained, from the fit and from its checkpoint.

    Not under FSDP1, where Lightning wraps the wrapped module once more and its own ``validate`` fails.
    """
    expected = {}
    for weights in ("slow", "fast"):
        with callback.use_weights(weights):
            expected[weights] = trainer.validate(model, verbose=False)[0]
    comparison = compare_weights(trainer, model)
    assert (comparison.slow, comparison.fast) == (expected["slow"], expected["fast"])
    assert comparison.slow != comparison.fast

    def held():
        return [local(parameter).detach().clone() for parameter in trainer.strategy.model.parameters()]

    before = held()
    again = compare_weights(trainer, model, ckpt_path=path)
    assert (again.slow, again.fast) == (expected["slow"], expected["fast"])
    assert equal(held(), before)
    assert compare_weights(trainer, model).to_dict() == comparison.to_dict()
    return expected


def check_sharded(kind, path):
    monitor = monitor_of()
    trainer, model, callback, watched = sharded(kind, monitor)
    _, _, _, plain = sharded(kind, None)
    assert len(plain) > 8
    assert equal(watched, plain)
    assert [(record.step, record.weights[0]) for record in monitor.history] == [
        *((0, "o"), (1, "i"), (2, "i"), (3, "i"), (3, "o"), (4, "i"), (5, "i"), (6, "i"), (6, "o"), (7, "i"))
    ]
    histories = [None] * dist.get_world_size()
    dist.all_gather_object(histories, [tuple(record) for record in monitor.history])
    assert all(history == histories[0] for history in histories)

    trainer.save_checkpoint(path)
    if kind != "fsdp1":
        expected = after_fit(trainer, model, callback, path)
        fresh = Ranked("SGD", kind)
        start = {name: parameter.detach().clone() for name, parameter in fresh.named_parameters()}
        other = make_trainer(strategy=strategy_for(kind), devices=dist.get_world_size(), limit_val_batches=1)
        again = compare_weights(other, fresh, ckpt_path=path)
        assert (again.slow, again.fast) == (expected["slow"], expected["fast"])
        whole = get_model_state_dict(other.strategy.model, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(whole[name], value) for name, value in start.items())


class Parallel(Classifier):
    """BatchNorm and dropout on data of its own on each rank."""


class Whole(Callback):
    """Evaluates all held-out data on this rank, with the buffers of the first, whatever the ranks have."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.random.fork_rng():
            module = Classifier()
        state = [{name: value.clone() for name, value in pl_module.state_dict().items()}]
        dist.broadcast_object_list(state)
        module.load_state_dict(state[0])
        module.eval()
        x, y = images(40, 3)[:]
        with torch.no_grad():
            prediction = module(x)
        loss = torch.nn.functional.cross_entropy(prediction, y).item()
        self.values.append(((prediction.argmax(1) == y).float().mean().item(), loss))


def parallel(monitor, *callbacks):
    torch.manual_seed(3 + dist.get_rank() if dist.is_initialized() else 3)
    model, callback = Parallel(batches=16), LookaheadCallback(k=3, monitor=monitor)
    trainer = make_trainer(
        callback, *callbacks, strategy="ddp", devices=2, max_steps=8, limit_val_batches=1.0, val_check_interval=3
    )
    trainer.fit(model)
    with callback.use_weights("fast"):
        state = [value.clone() for value in model.state_dict().values()]
    return [*state, torch.get_rng_state(), torch.tensor(model.order)]


def check_ddp():
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    monitor, whole = InnerOuterMonitor(updates=7), Whole()
    watched = parallel(monitor)
    assert equal(watched, parallel(None))
    parallel(seen := InnerOuterMonitor(updates=7), whole)
    assert seen.history == monitor.history
    last = {record.step: record for record in seen.history}  # of a sync, phi after it
    for step in range(1, 8):
        accuracy, loss = whole.values[step - 1]
        assert abs(last[step].value - accuracy) < 1e-6
        assert abs(last[step].loss - loss) < 1e-5
    assert len({record.value for record in seen.history}) > 3
    check_collectives()


def check_collectives():
    """The metric is reduced once, not once for each batch."""

    class Counting(Callback):
        def __init__(self):
            self.counts = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            from tests.helpers.collectives import collectives  # noqa: PLC0415

            for number in (1, 5):
                evaluation = Evaluation(MeanSquaredError(), regress)
                found = collectives(lambda n=number, e=evaluation: e.measure(trainer, [None] * n))
                self.counts.append(sorted(name for name in found if "c10d::" in name))

    class Plain(Ranked):
        def forward(self, x):
            return self.net(x)

    counting = Counting()
    make_trainer(counting, strategy="ddp", devices=2, max_steps=1).fit(Plain("SGD", "ddp"))
    once, five = counting.counts
    assert once == five
    assert once
