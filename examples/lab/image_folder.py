"""Folders of images, a folder for each class, as ImageNet comes: read by torchvision, which is imported here alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from examples.command_line import stop

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torchvision.datasets import ImageFolder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHERE = (
    "ImageNet (ILSVRC2012) is to be had at https://image-net.org, after registration; the folder must hold"
    " train/<class>/*.JPEG and val/<class>/*.JPEG, with the same classes in both."
)


class UnreadableError(Exception):
    """An image that cannot be read; its name and why."""


def vision() -> ModuleType:
    """Torchvision, imported where it is needed, so that --help and what is wrong with a folder are told without it."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        stop("torchvision is not installed: pip install torchvision")


def check(folder: Path | None) -> None:
    """Look at the folders of the classes, not into them.

    Raises:
        FileNotFoundError: If one is missing.
    """
    if folder is None:
        message = f"--data FOLDER is missing. {WHERE}"
        raise FileNotFoundError(message)
    classes = {}
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            message = f"no folder {str(folder / part)!r}. {WHERE}"
            raise FileNotFoundError(message)
        classes[part] = {path.name for path in (folder / part).iterdir() if path.is_dir()}
        if not classes[part]:
            message = f"{folder / part} has no folder for each class. {WHERE}"
            raise FileNotFoundError(message)
    for part, other in (("train", "val"), ("val", "train")):
        if missing := sorted(classes[other] - classes[part]):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            message = f"{folder / part} lacks the class {missing[0]}{more}, which is in {other}. {WHERE}"
            raise FileNotFoundError(message)


def read(path: str) -> Image.Image:
    """An image, or which one it is that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        message = f"{path} is no whole image ({error}): get it again. {WHERE}"
        raise UnreadableError(message) from error


def load(folder: Path, size: int) -> tuple[ImageFolder, ImageFolder]:
    """Training images as random crops, half of them mirrored, and validation images as the middle of each.

    Raises:
        FileNotFoundError: If a class has no image.
    """
    transforms = vision().transforms
    crops = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    middle = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    numbers = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    parts = {"train": transforms.Compose(crops + numbers), "val": transforms.Compose(middle + numbers)}
    try:
        train, val = (vision().datasets.ImageFolder(folder / part, how, loader=read) for part, how in parts.items())
    except FileNotFoundError as error:
        message = f"{folder}: {error}. {WHERE}"
        raise FileNotFoundError(message) from error
    return train, val


class Numbered(Dataset[tuple[Tensor, int]]):
    """Images whose augmentation depends on seed, epoch and image alone, not on who reads them or after what.

    So an epoch is the same after a restart and with any number of workers.
    """

    def __init__(self, images: Dataset[tuple[Tensor, int]], seed: int, epoch: int) -> None:
        self.images, self.start = images, (1000 * seed + epoch) * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        torch.manual_seed(self.start + index)
        return self.images[index]


class ImageFolders(LightningDataModule):
    """Each rank's part of the images.

    A number of devices that does not divide the number of images has some of them counted twice.

    Args:
        train: To train on.
        val: To look at.
        batch_size: Images in a batch of one device.
        seed: Of the order of the training images, and of their augmentation.
        workers: Processes that read images, for each device.
    """

    def __init__(self, train: ImageFolder, val: ImageFolder, *, batch_size: int, seed: int, workers: int) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.seed, self.workers = batch_size, seed, workers

    def train_dataloader(self) -> DataLoader:
        # Asked for anew before every epoch: after a restart Lightning tells a loader its epoch when workers have begun.
        seed, epoch = self.seed, self.trainer.current_epoch
        images = Numbered(self.train, seed, epoch)
        order = DistributedSampler(images, self.trainer.world_size, self.trainer.global_rank, seed=seed)
        order.set_epoch(epoch)
        return self._loader(images, order)

    def val_dataloader(self) -> DataLoader:
        ranks = self.trainer.world_size, self.trainer.global_rank
        return self._loader(self.val, DistributedSampler(self.val, *ranks, shuffle=False))

    def _loader(self, images: Dataset[Any], sampler: DistributedSampler) -> DataLoader:
        return DataLoader(
            images,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


def make_images(folder: Path, classes: int = 6, train: int = 4, val: int = 2) -> Path:
    """A folder of small pictures, each class in a colour of its own; the same whoever makes it."""
    numbers = np.random.default_rng(0)
    colours = numbers.integers(0, 128, (classes, 3))
    for part, count in (("train", train), ("val", val)):
        for kind, colour in enumerate(colours):
            own = folder / part / f"class{kind}"
            own.mkdir(parents=True)
            for number in range(count):
                pixels = (colour + numbers.integers(0, 128, (72, 96, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(own / f"{number}.JPEG")
    return folder
