"""What a sync does to the process group: nothing."""

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from lightning_lookahead import SlowWeights


def collectives(call):
    """Names of the collectives that ``call`` issues, from Python or from C++."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return [event.key for event in seen.key_averages() if "gloo:" in event.key or "c10d::" in event.key]


class Counting(Callback):
    def __init__(self):
        self.syncs = 0

    def on_fit_start(self, trainer, pl_module):
        assert collectives(lambda: dist.all_reduce(torch.ones(1))), "the profiler no longer shows collectives"
        original = SlowWeights.sync

        def sync(slow):
            found = collectives(lambda: original(slow))
            assert not found, f"a sync issued {found}"
            self.syncs += 1

        SlowWeights.sync, self.original = sync, original

    def teardown(self, trainer, pl_module, stage):  # the process goes on to other tests
        SlowWeights.sync = self.original
