"""A run that is killed in the middle of a step and goes on from its newest whole checkpoint.

    python examples/resume.py

trains a small network on scikit-learn's digits once without a break, and once in a process that ends by SIGKILL, which
no program can catch, between a backward and the optimizer's step. A checkpoint that is cut off is put beside the whole
ones. The run goes on in this process, and its end is compared with that of the first one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from command_line import parser_of, stoppable
from common import CPU, Digits, DigitsData, quietly
from lightning_lookahead import LookaheadCallback, newest_checkpoint

EPOCHS = 6
KILLED = 150
"""Steps that are taken before the process is killed: an epoch has 43."""


class OrderedDigits(DigitsData):
    """Each epoch has an order of its own, which is the same in a run that goes on from there."""

    def train_dataloader(self) -> DataLoader:
        epoch = torch.Generator().manual_seed(self.trainer.current_epoch)
        order = torch.randperm(len(self.train), generator=epoch).tolist()
        return DataLoader(self.train, batch_size=32, sampler=order)


class Kill(Callback):
    """Ends the process as a power cut does."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *more: Callback) -> list[torch.Tensor]:
    """Do a run, or the rest of it. Returns fast and slow weights and the optimizer's momentum."""
    seed_everything(0, verbose=False)
    folder.mkdir(exist_ok=True)
    lookahead = LookaheadCallback(k=5, alpha=0.5)
    every_epoch = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[lookahead, every_epoch, *more],
        reload_dataloaders_every_n_epochs=1,
        devices=1,
        **CPU,
    )
    model = Digits()
    trainer.fit(model, OrderedDigits(), ckpt_path=newest_checkpoint(folder))
    found = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
    for weights in ("fast", "slow"):
        with lookahead.use_weights(weights):
            found += [parameter.detach().clone() for parameter in model.parameters()]
    return found


def compare(folder: Path) -> bool:
    """Whether the run that was killed ends as the one that was not."""
    whole = train(folder / "whole")
    checkpoints = folder / "killed"
    command = [sys.executable, __file__, "--killed", str(checkpoints)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603
    print(f"killed after {KILLED} steps by {signal.Signals(-done.returncode).name}")

    newest = newest_checkpoint(checkpoints)
    if newest is None:
        return False
    data = newest.read_bytes()
    cut = checkpoints / "cut.ckpt"
    cut.write_bytes(data[: len(data) // 2])
    print(f"goes on from {newest_checkpoint(checkpoints).name}, not from {cut.name}, which is newer and half a file")
    pairs = list(zip(whole, train(checkpoints), strict=True))
    numbers = sum(one.numel() for one, _ in pairs)
    differing = sum((one != other).sum().item() for one, other in pairs)
    print(
        f"fast and slow weights and momentum: {differing:,} of {numbers:,} numbers differ from those of the first run"
    )
    return all(torch.equal(one, other) for one, other in pairs)


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--killed", type=Path, help="(for the process that this program starts)")
    args = parser.parse_args()
    quietly()
    if args.killed:
        train(args.killed, Kill())
        return
    with TemporaryDirectory() as folder:
        equal = compare(Path(folder))
    print(f"equal bit for bit: {equal}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
