"""Run by `test_elastic.py` under torchrun, as a module with the arguments KIND FOLDER WHEN.

Goes on from the newest whole checkpoint in FOLDER. The first time it runs, a rank is killed: WHEN is ``"step"``, in the
middle of a cycle, or ``"save"``, while a checkpoint is being written.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lookahead import newest_checkpoint
from tests.helpers.runs import leave
from tests.helpers.sharded import fit


class KillOnce(Callback):
    def __init__(self, kind, folder, when):
        self.folder, self.when = Path(folder), when
        # Under DDP rank 0 writes the file; among shards each rank writes its own, and the index comes last.
        self.rank = 0 if when == "save" and kind in {"ddp", "apart"} else 1

    def kill(self, trainer):
        marker = self.folder / "killed"
        if trainer.global_step == 5 and trainer.global_rank == self.rank and not marker.exists():
            marker.touch()
            if self.rank == 0:  # half a file, as a write that was cut off leaves it
                whole = (self.folder / "step=4.ckpt").read_bytes()
                (self.folder / "step=5.ckpt").write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.when == "step":
            self.kill(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.when == "save":
            self.kill(trainer)


def main():
    kind, folder, when = sys.argv[1:4]
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    path = newest_checkpoint(folder, "step=*.ckpt")
    trainer, _, _ = fit(kind, "SGD", KillOnce(kind, folder, when), every, ckpt_path=path)
    trainer.save_checkpoint(Path(folder, "end.ckpt"))
    if trainer.is_global_zero:
        print(f"went on from {path.name if path else 'the start'}")  # noqa: T201
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
