"""Images as tensors: CIFAR, Fashion-MNIST and digits, read with numpy, and the paper's augmentation."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Iterator

FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR10 = {"train": [f"data_batch_{part}.bin" for part in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR100 = {"train": ["train.bin"], "test": ["test.bin"]}
IDX = {
    part: (f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte")
    for part, name in (("train", "train"), ("test", "t10k"))
}
WHERE = (
    "CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html, binary version: a folder with data_batch_1.bin ... _5.bin and"
    " test_batch.bin (CIFAR-10) or train.bin and test.bin (CIFAR-100). Fashion-MNIST: apt-get install"
    " dataset-fashion-mnist, or a folder with train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and both of t10k-."
    " Nothing to get: digits."
)


class Images(NamedTuple):
    """A set of pictures in two parts: images of shape (n, channels, height, width) in uint8, labels of shape (n,)."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]


def load(data: str) -> Images:
    """Images by name (``fashion-mnist``, ``digits``) or from a folder of CIFAR's binary or of IDX files.

    Raises:
        FileNotFoundError: If nothing is there; says where to get it.
        ValueError: If a file is not whole.
    """
    if data == "digits":
        return _digits()
    folder = FASHION if data == "fashion-mnist" else Path(data)
    if (folder / "data_batch_1.bin").exists():
        return Images("CIFAR-10", *(_cifar(folder, CIFAR10[part], labels=1) for part in ("train", "test")))
    if (folder / "train.bin").exists():
        return Images("CIFAR-100", *(_cifar(folder, CIFAR100[part], labels=2) for part in ("train", "test")))
    if any((folder / f"train-images-idx3-ubyte{end}").exists() for end in ("", ".gz")):
        name = "Fashion-MNIST" if "fashion" in folder.resolve().name else folder.resolve().name
        return Images(name, *(_idx_pair(folder, *IDX[part]) for part in ("train", "test")))
    message = f"no images in {str(folder)!r}. {WHERE}"
    raise FileNotFoundError(message)


def _digits() -> Images:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.as_tensor(images[order] / 16 * 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    y = torch.as_tensor(labels[order])
    return Images("digits", (x[450:], y[450:]), (x[:450], y[:450]))


def _cifar(folder: Path, names: list[str], labels: int) -> tuple[Tensor, Tensor]:
    """Records of one or two label bytes (the last one counts) and 3x32x32 pixels."""
    record = labels + 3 * 32 * 32
    images = {("data_batch_1.bin"): 10_000, "test_batch.bin": 10_000, "train.bin": 50_000, "test.bin": 10_000}
    parts = []
    for name in names:
        expected = images.get(name, 10_000) * record
        raw = _read(folder / name)
        if len(raw) != expected:
            message = f"{folder / name} has {len(raw):,} bytes, not {expected:,}: get it again. {WHERE}"
            raise ValueError(message)
        parts.append(raw.reshape(-1, record))
    rows = np.concatenate(parts)
    return torch.from_numpy(rows[:, labels:].reshape(-1, 3, 32, 32)), torch.from_numpy(rows[:, labels - 1]).long()


def _idx_pair(folder: Path, images: str, labels: str) -> tuple[Tensor, Tensor]:
    x, y = _idx(folder, images, dimensions=3), _idx(folder, labels, dimensions=1)
    if len(x) != len(y):
        message = f"{folder}: {len(x):,} images in {images} and {len(y):,} labels in {labels}. {WHERE}"
        raise ValueError(message)
    return torch.from_numpy(x).unsqueeze(1), torch.from_numpy(y).long()


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file: 0, 0, 8 (unsigned bytes), the number of dimensions, their sizes as big-endian int32, the bytes."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    raw = _read(path)
    header = 4 + 4 * dimensions
    if len(raw) >= header and raw[:4].tolist() == [0, 0, 8, dimensions]:
        shape = raw[4:header].view(">i4").tolist()
        if len(raw) == header + int(np.prod(shape)):
            return raw[header:].reshape(shape)
    message = f"{path} is not a whole IDX file of {dimensions} dimension(s): get it again. {WHERE}"
    raise ValueError(message)


def _read(path: Path) -> np.ndarray:
    """The bytes of a file; writable, as torch wants them."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        message = f"{path} is missing. {WHERE}"
        raise FileNotFoundError(message) from error
    except (EOFError, OSError) as error:
        message = f"{path} is not whole ({error}): get it again. {WHERE}"
        raise ValueError(message) from error
    return np.frombuffer(bytearray(raw), dtype=np.uint8)


class Shuffled(Sampler[Tensor]):
    """Whole batches of indices, in the same order whenever and however often it is gone through."""

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed))
        return iter(order.split(self.batch_size)[: len(self)])


class ImageData(LightningDataModule):
    """Whole batches out of memory, as numbers with mean 0 and standard deviation 1 over the training images.

    Args:
        images: What to train and look at.
        batch_size: Images in a training batch; the last, smaller batch of an epoch is left out.
        seed: Of the order of the training images.
        held_out: Images taken from the end of the training ones to look at instead of the test images, for tuning;
            0 to look at the test images.
        size: Height and width to average the images down to; 0 leaves them as they are.
        limit: Images to train on, and to look at; 0 for all.
    """

    def __init__(
        self, images: Images, *, batch_size: int, seed: int, held_out: int = 0, size: int = 0, limit: int = 0
    ) -> None:
        super().__init__()
        (x, y), (x_test, y_test) = images.train, images.test
        if held_out:
            x, y, x_test, y_test = x[:-held_out], y[:-held_out], x[-held_out:], y[-held_out:]
        if limit:
            x, y, x_test, y_test = x[:limit], y[:limit], x_test[:limit], y_test[:limit]
        x, x_test = (_resize(part.float() / 255, size) for part in (x, x_test))
        mean, std = (f(x, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        self.train, self.test = TensorDataset((x - mean) / std, y), TensorDataset((x_test - mean) / std, y_test)
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> DataLoader:
        """The Trainer asks anew before every epoch, so that the order is the epoch's after a restart, too."""
        order = Shuffled(len(self.train), self.batch_size, 1000 * self.seed + self.trainer.current_epoch)
        # With a generator of its own a loader does not move the augmentation's random numbers.
        return DataLoader(self.train, sampler=order, batch_size=None, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        sampler = BatchSampler(SequentialSampler(self.test), 1000, drop_last=False)
        return DataLoader(self.test, sampler=sampler, batch_size=None)

    test_dataloader = val_dataloader


def _resize(x: Tensor, size: int) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(x, size) if size else x


def augment(x: Tensor) -> Tensor:
    """Each image shifted by up to an eighth of its size, zeros at the border, and mirrored or not.

    For 32x32 images: a random crop of the image padded by 4, and a random horizontal flip.

    Args:
        x: Images of shape (n, channels, size, size).
    """
    n, _, size, _ = x.shape
    pad = max(size // 8, 1)
    padded = nn.functional.pad(x, (pad,) * 4)
    rows, columns = (
        torch.randint(2 * pad + 1, (n, 1), device=x.device) + torch.arange(size, device=x.device) for _ in "xy"
    )
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)  # noqa: PLR2004 (a coin)
    each = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
