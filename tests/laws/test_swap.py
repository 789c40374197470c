"""A swap undone leaves everything as it was, whatever was raised inside, and the run is the one without it."""

import contextlib
import copy

import pytest
import torch

from tests.cases import CASES
from tests.helpers.modes import At, held, lookahead
from tests.helpers.random_networks import same


def everything(trainer, module):
    """What nobody may notice: identities, storages, gradients, values, states of optimizers, random numbers."""
    parameters, buffers = list(module.parameters()), list(module.buffers())
    return {
        "tensors": [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in (*parameters, *buffers)],
        "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
        "values": copy.deepcopy(dict(module.state_dict())),
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "random numbers": torch.get_rng_state(),
    }


def swap(trainer, module):
    callback = trainer.callbacks[0]
    before, sets = everything(trainer, module), held(callback, module)
    for error in (ValueError, KeyboardInterrupt):
        with contextlib.suppress(error), callback.use_weights("slow"), callback.use_weights("slow"):
            same(dict(module.state_dict()), sets["slow"], "slow")
            with callback.use_weights("fast"):
                same(dict(module.state_dict()), before["values"], "fast")
            same(dict(module.state_dict()), sets["slow"], "slow again")
            raise error
    same(everything(trainer, module), before, "after a swap")
    same(held(callback, module), sets, "both sets after a swap")


@pytest.mark.parametrize("name", CASES)
def test_either_set_is_shown_after_every_batch_and_the_run_does_not_notice(name):
    same(lookahead(name, At(swap)), lookahead(name), name)
