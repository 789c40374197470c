"""What a sync and a swap do to the process group, on two ranks."""

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from lightning_lookahead import AdaptiveAlpha, LookaheadCallback
from tests.distributed.resume_worker import Ranked
from tests.helpers.collectives import Counting
from tests.helpers.runs import both, equal, make_trainer


def agree(tensors):
    for tensor in tensors:
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor)
        assert all(torch.equal(tensor, other) for other in gathered)


class Agreeing(Callback):
    def __init__(self, lookahead):
        self.lookahead = lookahead

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for weights in ("slow", "fast"):
            agree(tensor.detach() for slow in self.lookahead.slow_weights for tensor in slow.values(weights).values())


class Poison(Callback):
    """Changes one weight on one rank."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net[2].weight[0, 0] += 1e-9


def drift(*, check_ranks):
    callback = LookaheadCallback(k=3, check_ranks=check_ranks)
    trainer = make_trainer(Poison(), callback, max_steps=8, strategy="ddp", devices=2, use_distributed_sampler=False)
    trainer.fit(Ranked())


def agree_and_issue_no_collective():
    drift(check_ranks=False)
    try:
        drift(check_ranks=True)
    except RuntimeError as error:
        assert "'net.2.weight' differs between ranks" in str(error), error  # noqa: PT017
    else:
        message = "the drift was not noticed"
        raise AssertionError(message)
    for curvature in ("secant", "hvp"):  # each rank has a loss of its own, and all have to go the same way
        adaptive = LookaheadCallback(k=3, alpha=AdaptiveAlpha(curvature), pullback_momentum="pullback")
        make_trainer(adaptive, Agreeing(adaptive), max_steps=8, strategy="ddp", devices=2).fit(Ranked())
        agree([torch.tensor(adaptive.slow_weights[0].alpha.last)])
        assert adaptive.slow_weights[0].syncs == 2
    callback, counting, module = LookaheadCallback(k=3, log_distance=True), Counting(), Ranked()
    trainer = make_trainer(
        callback, counting, Agreeing(callback), max_steps=8, strategy="ddp", devices=2, limit_val_batches=1
    )
    trainer.fit(module)
    assert counting.syncs == 2
    theta, phi = both(callback, module)
    assert equal(module.weights(), phi)
    assert not equal(theta, phi)
    if trainer.is_global_zero:
        torch.save((theta, phi), "ddp.pt")
