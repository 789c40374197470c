"""What needs a GPU: NCCL, CPU offload, and the full state dicts of FSDP1, which torch cannot make over gloo."""

import subprocess
import sys

import pytest
import torch
from test_resume import run
from test_sharded import WORKER, close, loaded, reference, same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA"),
    pytest.mark.usefixtures("visible"),
]
KINDS = ["ddp", "fsdp1", "fsdp1_flat", "fsdp1_full", "fsdp1_grad_op", "fsdp1_offload", "fsdp2", "fsdp2_full"]


@pytest.fixture
def visible(monkeypatch):
    """Let a GPU be seen, which the other tests hide."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = subprocess.run(
        [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"], check=False
    )
    if asked.returncode:
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_what_one_cpu_gives_and_resumes_bit_for_bit(kind, tmp_path):
    run(WORKER, "train", kind, "SGD", tmp_path)
    end = loaded(tmp_path / "end.ckpt")
    assert close(end, reference(kind, "SGD"), 1e-4 if "fsdp1" in kind else 1e-10)
    run(WORKER, "resume", kind, "SGD", *(tmp_path / f"step={step}.ckpt" for step in (2, 3, 4)))
    for step in (2, 3, 4):
        assert same(loaded(tmp_path / f"step={step}-resumed.ckpt"), end)
