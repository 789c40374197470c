"""What the examples of this folder share: scikit-learn's digits, a small network, and a Trainer for them."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lookahead import LookaheadCallback

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

CPU: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
"""Arguments of every Trainer here."""
ALONE: dict[str, Any] = {**CPU, "devices": 1, "enable_checkpointing": False}
"""Those of one that trains in one process and saves nothing."""


class Digits(LightningModule):
    """A small convolutional network for 8x8 images, trained by SGD with momentum."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters("lr", "momentum")
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return nn.functional.cross_entropy(self(images), digits)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        scores = self(images)
        self.accuracy(scores, digits)
        self.log("accuracy", self.accuracy, prog_bar=True)
        self.log("loss", nn.functional.cross_entropy(scores, digits))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self(images).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=self.hparams["momentum"])


class DigitsData(LightningDataModule):
    """1,347 images to train on and 450 to test on, the same in every run.

    That makes 43 batches of 32, so that 8 epochs end four steps after a sync and slow and fast weights differ.
    """

    def setup(self, stage: str) -> None:
        images, digits = load_digits(return_X_y=True)
        split = train_test_split(images, digits, test_size=0.25, random_state=0, stratify=digits)
        x, x_test, y, y_test = (torch.as_tensor(part) for part in split)
        self.train, self.held_out = (
            TensorDataset(a.float().reshape(-1, 1, 8, 8) / 16, b) for a, b in ((x, y), (x_test, y_test))
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=450)

    test_dataloader = predict_dataloader = val_dataloader


def accuracy(model: nn.Module) -> float:
    """The part of the test images that a model gets right."""
    data = DigitsData()
    data.setup("test")
    images, digits = data.held_out.tensors
    with torch.no_grad():
        return (model(images).argmax(dim=1) == digits).float().mean().item()


def quietly() -> None:
    """Nothing said of what is meant to be so, and one thread: in networks this small more only wait for one another."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    texts = "num_workers|LeafSpec|exists and is not empty|dirpath has changed|sync_dist"
    warnings.filterwarnings("ignore", message=f".*({texts}).*")
    torch.set_num_threads(1)


def parse(parser: ArgumentParser) -> Namespace:
    """Add ``--k`` and ``--alpha``, and read the command line.

    Raises:
        SystemExit: With one line, if Lookahead refuses them.
    """
    parser.add_argument("--k", type=int, default=5, help="inner steps between two syncs (5)")
    parser.add_argument("--alpha", type=float, default=0.5, help="slow weights step size, in (0, 1] (0.5)")
    args = parser.parse_args()
    try:
        LookaheadCallback(args.k, args.alpha)
    except ValueError as error:
        parser.error(str(error))
    return args
