import logging
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers.processes import Groups

# The same examples in every run, however busy the machine is. `--hypothesis-profile=explore` looks for others.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **PATIENT)
settings.register_profile("explore", max_examples=1000, print_blob=True, **PATIENT)
settings.load_profile("same")

# Lightning imports what it finds; a GPU at hand must not change what these tests are about.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)
for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
    logging.getLogger(package).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Calls functions on several ranks."""
    groups = Groups(tmp_path_factory)
    yield groups
    groups.close()


@pytest.fixture(scope="session")
def program(ranks):
    """Runs a program in a process that need not import torch and Lightning once more."""
    return ranks.forks().program


@pytest.fixture(scope="session")
def bare_program(ranks):
    """The same in a process that has imported torch and nothing of Lightning."""
    return ranks.forks("torch").program


@pytest.fixture(autouse=True)
def _seed_and_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
