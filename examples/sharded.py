"""Weights in shards over two processes (FSDP2), the folder that they save, and what can be done with it.

    python examples/sharded.py                                            # Lightning starts the second process
    torchrun --standalone --nproc-per-node=2 examples/sharded.py          # or torchrun starts both

trains a small network on scikit-learn's digits, with a folder of shards after every epoch: each process writes its own.
A second run goes on from the middle, and its end is compared with that of the first. At last one process reads both
sets of weights out of a folder, without a Trainer. All of it is on the CPU, with gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed
from torch.distributed.fsdp import fully_shard

from command_line import stoppable
from common import CPU, Digits, DigitsData, accuracy, quietly
from lightning_lookahead import LookaheadCallback, load_weights

EPOCHS, FROM = 4, 1
OUT = Path("outputs/sharded")


class ShardedDigits(Digits):
    """Each process keeps a part of every layer's weights."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def train(folder: Path, start: Path | None = None) -> LookaheadCallback:
    """Train, or go on from a folder of shards; leave one after every epoch."""
    seed_everything(0, verbose=False)
    lookahead = LookaheadCallback(k=5, alpha=0.5)
    saving = ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer = Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        devices=2,
        max_epochs=EPOCHS,
        callbacks=[lookahead, saving],
        **CPU,
    )
    trainer.fit(ShardedDigits(), DigitsData(), ckpt_path=start)
    return lookahead


def held(lookahead: LookaheadCallback) -> list[int]:
    """How many numbers of the slow weights each process has."""
    (slow,) = lookahead.slow_weights
    own = sum(value.to_local().numel() for value in slow.values("slow").values())
    found = [0, 0]
    distributed.all_gather_object(found, own)
    return found


def look() -> bool:
    """Read the folders in one process. Returns whether the run that went on ends as the other."""
    last = f"epoch={EPOCHS - 1}.ckpt"
    print(f"{OUT / 'whole' / last}: {', '.join(sorted(path.name for path in (OUT / 'whole' / last).iterdir()))}")
    equal = True
    for weights in ("slow", "fast"):
        whole, resumed = (load_weights(OUT / run / last, weights) for run in ("whole", "resumed"))
        equal = equal and all(torch.equal(value, resumed[name]) for name, value in whole.items())
        model = Digits()
        model.load_state_dict(whole)
        print(f"test accuracy of the {weights} weights, in one process: {accuracy(model):.1%}")
    print(f"resumed after epoch {FROM + 1} of {EPOCHS}: both sets equal bit for bit: {equal}")
    return equal


@stoppable()
def main() -> None:
    quietly()
    sizes = held(train(OUT / "whole"))
    train(OUT / "resumed", OUT / "whole" / f"epoch={FROM}.ckpt")
    equal = True
    if distributed.get_rank() == 0:
        print(f"numbers of the slow weights in each process: {' and '.join(f'{size:,}' for size in sizes)}")
        equal = look()
    distributed.barrier()  # gloo ends with an error in a process that outlives the other
    distributed.destroy_process_group()
    sys.exit(not equal)


if __name__ == "__main__":
    main()
