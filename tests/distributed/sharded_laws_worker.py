"""Laws of sharded weights that need no second run, on two ranks."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_lookahead import LookaheadCallback, SlowWeights
from tests.helpers.collectives import Counting
from tests.helpers.runs import make_trainer
from tests.helpers.sharded import Sharded, fit, local, strategy_for


class Memory(Callback):
    """phi costs each rank what its shard of theta costs, and a swap moves no storage."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ((slow,),) = (c.slow_weights for c in trainer.callbacks if isinstance(c, LookaheadCallback))
        fast, phi = slow.values("fast"), slow.values("slow")
        storages = {local(one).untyped_storage().data_ptr(): local(one).untyped_storage() for one in phi.values()}
        assert sum(storage.nbytes() for storage in storages.values()) == sum(local(one).nbytes for one in fast)
        for parameter in fast:
            assert local(phi[parameter]).data_ptr() != local(parameter).data_ptr() or not local(parameter).numel()
        pointers = [local(parameter).data_ptr() for parameter in fast]
        with slow.use("slow"):
            assert [local(parameter).data_ptr() for parameter in fast] == pointers


def sharded_parameter():
    mesh = init_device_mesh("cpu", (2,))
    return torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))


def check_laws(kind):
    counting = Counting()
    fit(kind, "SGD", counting, Memory())
    assert counting.syncs == 2
    for option in ("check_ranks", "log_distance"):
        own = LookaheadCallback(**{option: True})
        trainer = make_trainer(own, max_steps=1, strategy=strategy_for(kind), devices=2)
        with pytest.raises(ValueError, match=f"{option}=True does not work with a strategy that shards"):
            trainer.fit(Sharded("SGD", kind))
    with pytest.raises(ValueError, match="sharded parameters: give the module"):
        SlowWeights(torch.optim.SGD([sharded_parameter()]))
