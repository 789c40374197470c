import logging
import os

import pytest
import torch

# Lightning imports what it finds; a GPU at hand must not change what these tests are about.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)
for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
    logging.getLogger(package).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seed_and_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
