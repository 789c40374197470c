"""What needs a GPU: NCCL, CPU offload, and the full state dicts of FSDP1, which torch cannot make over gloo."""

import subprocess
import sys

import pytest
import torch

from tests.helpers.sharded import close, loaded, reference, resume, same, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA GPU: this torch was built without CUDA"),
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
        pytest.skip("needs a CUDA GPU: torch finds none")


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_what_one_cpu_gives_and_resumes_bit_for_bit(kind, ranks, tmp_path):
    ranks(1, train, kind, "SGD", tmp_path, group="cuda")
    end = loaded(tmp_path / "end.ckpt")
    assert close(end, reference(kind, "SGD"), 1e-4 if "fsdp1" in kind else 1e-10)
    paths = [tmp_path / f"step={step}.ckpt" for step in (2, 3, 4)]
    ranks(1, resume, kind, "SGD", *paths, group="other cuda")
    for step in (2, 3, 4):
        assert same(loaded(tmp_path / f"step={step}-resumed.ckpt"), end)


def test_slow_weights_on_the_cpu_are_those_on_the_gpu_and_leave_nothing_there():
    program = """
import copy, torch
from lightning_lookahead import SlowWeights

def train(**options):
    torch.manual_seed(0)
    net = torch.nn.Linear(1000, 1000, device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = torch.cuda.memory_allocated()
    slow = SlowWeights(optimizer, k=3, **options)
    held = []
    for step in range(11):
        optimizer.zero_grad()
        net(torch.full((8, 1000), float(step), device="cuda")).square().mean().backward()
        optimizer.step()
        if step == 6:
            with slow.use("slow"):
                pass
        if step == 7:
            held.append(slow.cycles.steps_since_sync)
    torch.cuda.synchronize()
    kept = [*slow.values("slow").values(), *slow.pairs.outer_momentum.b.values()]
    bytes_held = sum(v.numel() * v.element_size() for v in kept if v.is_cuda)
    weights = [p.detach().clone() for p in net.parameters()]
    with slow.use("slow"):
        weights += [p.detach().clone() for p in net.parameters()]
    return weights, bytes_held

for options in ({}, {"outer_momentum": 0.9}):
    resident, held = train(**options)
    away, none = train(slow_device="cpu", **options)
    assert held > 0 and none == 0, (held, none)
    assert all(torch.equal(a, b) for a, b in zip(resident, away, strict=True))
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize(("nonfinite", "waits"), [("ignore", False), ("raise", True)])
def test_a_sync_waits_for_the_device_only_to_see_whether_weights_are_finite(nonfinite, waits):
    program = f"""
import torch
from lightning_lookahead import SlowWeights

net = torch.nn.Linear(100, 100, device="cuda")
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
slow = SlowWeights(optimizer, k=2, nonfinite={nonfinite!r})
for step in range(2):
    optimizer.zero_grad()
    net(torch.ones(8, 100, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "synchronizing" in str(error), error
        print("waits")
    torch.cuda.set_sync_debug_mode("default")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "waits\n" if waits else ""), done.stderr
