"""What the paper's programs share: data that is read or refused, the paper's networks, and their runs."""

import gzip
import os

import numpy as np
import pytest
import torch

from examples.lab import images
from examples.lab.models import resnet18, resnet32
from examples.lab.training import Classifier, Settings, train
from tests.helpers.places import EXAMPLES

PAPER = EXAMPLES / "paper"


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("train", 7), ("t10k", 3)):
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 256, (size, 5, 4)))))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(size)))
    return folder


def test_idx_files_are_read_packed_or_not(idx_folder):
    found = images.load(str(idx_folder))
    expected = np.random.default_rng(0).integers(0, 256, (7, 5, 4))
    assert torch.equal(found.train[0], torch.as_tensor(expected, dtype=torch.uint8).unsqueeze(1))
    assert found.train[1].tolist() == list(range(7))
    assert found.test[0].shape == (3, 1, 5, 4)
    assert (found.name, found.classes, found.channels) == ("small", 7, 1)


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        *(("train-images-idx3-ubyte.gz", keep) for keep in (0, 3, 10, 30, -1)),
        *(("t10k-labels-idx1-ubyte", keep) for keep in (0, 3, 8, -1)),
    ],
)
def test_a_half_downloaded_idx_file_is_named_in_one_line(idx_folder, name, keep):
    whole = (idx_folder / name).read_bytes()
    (idx_folder / name).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"{name} is not .*whole.*: get it again.*apt-get install") as error:
        images.load(str(idx_folder))
    assert "\n" not in str(error.value)


def test_a_missing_part_is_named_in_one_line(idx_folder, tmp_path):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.gz is missing\. CIFAR: https"):
        images.load(str(idx_folder))
    with pytest.raises(FileNotFoundError, match="no images in .*nowhere.*binary version"):
        images.load(str(tmp_path / "nowhere"))


def test_labels_and_images_must_be_as_many(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(6)))
    with pytest.raises(ValueError, match="7 images in .* and 6 labels in"):
        images.load(str(idx_folder))


def cifar_file(path, records, labels, first):
    """A sparse file of the right size whose first record is given."""
    path.write_bytes(first)
    with path.open("ab") as file:
        file.truncate(records * (labels + 3072))


def test_cifar_10_is_read_from_its_binary_files(tmp_path):
    pixels = np.arange(3072, dtype=np.uint8)
    for part in range(1, 6):
        cifar_file(tmp_path / f"data_batch_{part}.bin", 10_000, 1, bytes([part]) + pixels.tobytes())
    cifar_file(tmp_path / "test_batch.bin", 10_000, 1, bytes([9]) + pixels.tobytes())
    found = images.load(str(tmp_path))
    assert found.name == "CIFAR-10"
    assert found.train[0].shape == (50_000, 3, 32, 32)
    assert found.train[1][::10_000].tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(found.test[0][0].flatten(), torch.as_tensor(pixels))
    os.truncate(tmp_path / "data_batch_3.bin", 30_000_000)
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 30,000,000 bytes, not 30,730,000: get it again"):
        images.load(str(tmp_path))
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3.bin is missing"):
        images.load(str(tmp_path))


def test_cifar_100_takes_the_fine_label(tmp_path):
    cifar_file(tmp_path / "train.bin", 50_000, 2, bytes([19, 99]))
    cifar_file(tmp_path / "test.bin", 10_000, 2, bytes([19, 98]))
    found = images.load(str(tmp_path))
    assert (found.name, found.classes) == ("CIFAR-100", 100)
    assert (found.train[1][0].item(), found.test[1][0].item()) == (99, 98)


def test_augmentation_crops_the_padded_image_and_mirrors_half_of_them():
    x = torch.rand(500, 2, 16, 16) + 1
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for image, original in zip(images.augment(x), padded, strict=True):
        crops = {
            (row, column, mirrored): (crop.flip(2) if mirrored else crop)
            for row in range(5)
            for column in range(5)
            for crop in [original[:, row : row + 16, column : column + 16]]
            for mirrored in (False, True)
        }
        (which,) = (place for place, crop in crops.items() if torch.equal(image, crop))
        seen.add(which)
    assert len(seen) == 5 * 5 * 2


def test_the_networks_are_the_papers():
    # Parameters of the wide ResNet-18 for CIFAR-10 and of ResNet-32 with shortcuts that have none.
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962
    assert sum(p.numel() for p in resnet32(classes=10).parameters()) == 464_154
    for net in (resnet18(4), resnet32(4, classes=10)):
        assert net(torch.rand(2, 3, 14, 14)).shape == (2, 10)


@pytest.mark.parametrize("settings", [{}, {"k": 5}, {"average": 0.9}, {"k": 4, "optimizer": "adamw", "lr": 1e-3}])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, settings, monkeypatch):
    digits = images.load("digits")
    run = Settings("digits", epochs=3, width=8, limit=200, batch_size=32, **settings)
    whole = train(run, digits, tmp_path / "whole")

    begin = Classifier.on_train_epoch_start

    def stop_in_the_last_epoch(self):
        assert self.current_epoch < 2, "stopped"
        begin(self)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="stopped"):
        patch.setattr(Classifier, "on_train_epoch_start", stop_in_the_last_epoch)
        train(run, digits, tmp_path / "part")
    assert (tmp_path / "part" / "last.ckpt").exists()
    assert train(run, digits, tmp_path / "part") == whole


def test_a_run_that_diverges_says_after_which_step(tmp_path):
    run = Settings("digits", lr=1e12, k=5, epochs=1, width=8, limit=200, batch_size=32)
    results = train(run, images.load("digits"), tmp_path)
    assert list(results) == ["diverged"]
    assert 0 < results["diverged"] < 6
