"""`SlowWeights` in a Fabric loop with FSDP2, saved and resumed, on two ranks."""

import os

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lightning_lookahead import SlowWeights
from tests.helpers.runs import inputs
from tests.helpers.sharded import K, Net


def parallelize(model, mesh):
    fully_shard(model[0], mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def prepare(fabric):
    torch.manual_seed(5)
    net = fabric.setup_module(Net().to(torch.float64))
    optimizer = fabric.setup_optimizers(torch.optim.Adam(net.parameters(), lr=0.05))
    return net, optimizer, SlowWeights(optimizer, k=K, module=net)


def train(fabric, net, optimizer, slow, steps):
    for step in steps:
        optimizer.zero_grad()
        fabric.backward((net(inputs(step)) - 1).square().mean())
        optimizer.step()
        with torch.no_grad(), slow.use("slow"):
            net(inputs(step))


def full(slow, weights):
    return [tensor.full_tensor() for tensor in slow.values(weights).values()]


def resume_in_fabric():
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    net, optimizer, slow = prepare(fabric)
    train(fabric, net, optimizer, slow, range(4))
    shards = slow.state_dict()
    if fabric.global_rank == 0:  # which Fabric.save pickles on
        with pytest.raises(TypeError, match=r"state_dict\(whole=True\)"):
            torch.save({"slow": shards}, "shards.pt")
    fabric.save("fabric", {"net": net, "optimizer": optimizer, "slow": slow.state_dict(whole=True)})
    train(fabric, net, optimizer, slow, range(4, 8))

    resumed = prepare(fabric)
    again = resumed[2]
    state = {"net": resumed[0], "optimizer": resumed[1], "slow": None}
    fabric.load("fabric", state)
    again.load_state_dict(state["slow"])
    train(fabric, *resumed, range(4, 8))
    for weights in ("slow", "fast"):
        pairs = zip(full(slow, weights), full(again, weights), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{weights} weights differ after the resume"
    assert (again.steps, again.syncs) == (8, 2)
    return {weights: full(slow, weights) for weights in ("slow", "fast")}


def resume_by_distributed_checkpoint(folder, *, saves):
    """A loop that saves all three with torch.distributed.checkpoint, and one on any number of ranks that loads them."""
    size = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=size, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy)
    fabric.launch()
    net, optimizer, slow = prepare(fabric)

    def state():
        net_state, optimizer_state = get_state_dict(net._forward_module, optimizer.optimizer)
        return {"net": net_state, "optimizer": optimizer_state, "slow": slow}

    if saves:
        train(fabric, net, optimizer, slow, range(4))
        save(state(), checkpoint_id=folder)
    else:
        loaded = state()
        load(loaded, checkpoint_id=folder)
        set_state_dict(
            net._forward_module,
            optimizer.optimizer,
            model_state_dict=loaded["net"],
            optim_state_dict=loaded["optimizer"],
        )
    train(fabric, net, optimizer, slow, range(4, 8))
    assert (slow.steps, slow.syncs) == (8, 2)
    return {weights: full(slow, weights) for weights in ("slow", "fast")}
