"""Run by `test_elastic.py` under torchrun: ``elastic_worker.py KIND FOLDER WHEN``.

Goes on from the newest whole checkpoint in FOLDER. The first time it runs, rank 1 is killed: WHEN is ``"step"``, in the
middle of a cycle, or ``"save"``, while a checkpoint is being written.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import leave
from sharded_worker import fit

from lightning_lookahead import load_weights


def newest_whole(folder):
    """The newest checkpoint that can be read to its end, if there is one."""
    for path in sorted(Path(folder).glob("step=*.ckpt"), key=os.path.getmtime, reverse=True):
        try:
            load_weights(path)
        except ValueError:
            continue
        return path
    return None


class KillOnce(Callback):
    def __init__(self, folder, when):
        self.marker, self.when = Path(folder, "killed"), when

    def kill(self, trainer):
        if trainer.global_rank == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.when == "step" and trainer.global_step == 5:
            self.kill(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.when == "save" and trainer.global_step == 5:
            self.kill(trainer)


def main():
    kind, folder, when = sys.argv[1:4]
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    path = newest_whole(folder)
    trainer, _, _ = fit(kind, "SGD", KillOnce(folder, when), every, ckpt_path=path)
    trainer.save_checkpoint(Path(folder, "end.ckpt"))
    if trainer.is_global_zero:
        print(f"went on from {path.name if path else 'the start'}")  # noqa: T201
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
