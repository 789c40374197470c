"""Killed ranks and several nodes: what torchrun makes of them."""

import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from tests.helpers.places import environment
from tests.helpers.sharded import close, loaded, reference, same, train

ELASTIC = ("-m", "tests.distributed.elastic_worker")
WORKER = ("-m", "tests.helpers.sharded")


def torchrun(*arguments):
    # Without the last one torch 2.13 hands restarted ranks the addresses of the dead ones (seen with gloo, without us).
    own = environment(PYTHONWARNINGS="ignore", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "save"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "apart"])
def test_a_killed_rank_is_started_again_from_the_last_whole_checkpoint(kind, when, ranks, tmp_path):
    job = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1", *ELASTIC, kind, tmp_path, when)
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0, output[-4000:]
    assert (tmp_path / "killed").exists()
    assert when == "step" or (tmp_path / "step=5.ckpt").exists()
    assert "went on from step=4.ckpt" in output
    (tmp_path / "whole").mkdir()
    ranks(2, train, kind, "SGD", tmp_path / "whole")
    assert same(loaded(tmp_path / "end.ckpt"), loaded(tmp_path / "whole" / "end.ckpt"))


def on_two_nodes(*arguments):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free, held open here
    where = f"--rdzv-endpoint=127.0.0.1:{store.port}"
    rendezvous = ("--rdzv-backend=c10d", where, "--rdzv-conf=is_host=false", "--rdzv-id=two")
    nodes = [torchrun("--nnodes=2", "--nproc-per-node=1", *rendezvous, *arguments) for _ in range(2)]
    for node in nodes:
        output = node.communicate(timeout=200)[0]
        assert node.returncode == 0, output[-4000:]


@pytest.mark.slow
def test_two_nodes_train_and_resume(tmp_path):
    on_two_nodes(*WORKER, "train", "fsdp2", "SGD", tmp_path)
    on_two_nodes(*WORKER, "resume", "fsdp2", "SGD", tmp_path / "step=4.ckpt")
    end = loaded(tmp_path / "end.ckpt")
    assert close(end, reference("fsdp2", "SGD"), 1e-12)
    assert same(loaded(tmp_path / "step=4-resumed.ckpt"), end)
