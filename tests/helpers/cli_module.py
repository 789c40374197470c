"""What the tests of the command line name in it."""

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tests.helpers.classifier import Classifier, images


class Model(Classifier):
    """A module that can be fitted, validated, tested and asked for predictions.

    Args:
        lr: Learning rate of SGD.
    """

    def __init__(self, lr: float = 0.2):
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        print("predicted", len(self(batch[0])))  # noqa: T201


class Failing(Model):
    def training_step(self, batch, batch_idx):
        message = "of the model's own"
        raise ValueError(message)


class Unset(Model):
    def setup(self, stage):
        message = "of the model's own"
        raise ValueError(message)


class Mislogging(Model):
    def training_step(self, batch, batch_idx):
        self.log("x", "hello")


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(images(64, 2), batch_size=8)

    def val_dataloader(self):
        return DataLoader(images(40, 3), batch_size=20)

    test_dataloader = predict_dataloader = val_dataloader
