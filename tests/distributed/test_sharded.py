"""Sharded training in real processes: FSDP1, FSDP2, hybrid and tensor parallel, on the CPU over gloo."""

import pytest

from tests.distributed.fabric_worker import resume_by_distributed_checkpoint, resume_in_fabric
from tests.distributed.foreign_worker import start_from_a_foreign_checkpoint
from tests.distributed.sharded_laws_worker import check_laws
from tests.helpers.sharded import Sharded, close, distance, loaded, reference, resume, same, train

KINDS = ["ddp", "fsdp1", "fsdp1_flat", "fsdp1_grad_op", "fsdp2", "fsdp2_full", "fsdp2_hsdp", "tp", "tp_full"]


OTHER = "other"
"""Processes that have not trained what they resume."""


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_give_what_one_gives_and_resume_bit_for_bit(kind, ranks, tmp_path):
    processes = 4 if kind == "fsdp2_hsdp" else 2
    ranks(processes, train, kind, "SGD", tmp_path)
    end, expected = loaded(tmp_path / "end.ckpt"), reference(kind, "SGD")
    assert distance(expected["slow"], expected["fast"]) > 1e-4
    assert close(end, expected, 1e-6 if "fsdp1" in kind else 1e-12)
    steps = (2, 3, 4)  # within a cycle, right after a sync, one step into the next cycle
    ranks(processes, resume, kind, "SGD", *(tmp_path / f"step={step}.ckpt" for step in steps), group=OTHER)
    for step in steps:
        assert same(loaded(tmp_path / f"step={step}-resumed.ckpt"), end)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "fsdp2_full"])
def test_adam_and_accumulation(kind, ranks, tmp_path):
    twice = {"accumulate_grad_batches": 2}
    ranks(2, train, kind, "Adam", tmp_path, **twice)
    end = loaded(tmp_path / "end.ckpt")
    assert close(end, reference(kind, "Adam", accumulate=2), 1e-5 if "fsdp1" in kind else 1e-12)
    ranks(2, resume, kind, "Adam", *(tmp_path / f"step={step}.ckpt" for step in (1, 5)), group=OTHER, **twice)
    for step in (1, 5):
        assert same(loaded(tmp_path / f"step={step}-resumed.ckpt"), end)


@pytest.mark.parametrize(
    ("kind", "mode", "optimizer"),
    [
        ("fsdp2", "reset", "SGD"),
        ("fsdp2", "reset", "Adam"),
        ("fsdp2", "pullback", "Adam"),
        ("fsdp2", "schedule", "SGD"),
        ("fsdp2", "groups", "Adam"),
        ("fsdp1", "pullback", "SGD"),
        ("ddp", "momentum", "SGD"),
        ("fsdp1", "momentum", "SGD"),
        ("fsdp2", "momentum", "Adam"),
        ("fsdp2_full", "momentum", "SGD"),
        ("tp", "momentum", "Adam"),
    ],
)
def test_the_modes_give_what_one_process_gives_and_resume_bit_for_bit(kind, mode, optimizer, ranks, tmp_path):
    ranks(2, train, kind, optimizer, tmp_path, mode=mode)
    end = loaded(tmp_path / "end.ckpt")
    # The module for tensor parallelism is another one.
    alone = {"tp": (1, train, "tp"), "ddp": (1, train, "single")}.get(kind, (2, train, "ddp"))
    ranks(*alone, optimizer, tmp_path / "one", mode=mode)
    tolerance = 1e-5 if "fsdp1" in kind else 1e-11
    assert close(
        end, {w: as_(end[w], values) for w, values in loaded(tmp_path / "one" / "end.ckpt").items()}, tolerance
    )
    steps = (2, 3, 4)
    paths = [tmp_path / f"step={step}.ckpt" for step in steps]
    ranks(2, resume, kind, optimizer, *paths, mode=mode, group=OTHER)
    for step in steps:
        assert same(loaded(tmp_path / f"step={step}-resumed.ckpt"), end)


def as_(names, values):
    return {name: values[name].to(names[name].dtype) for name in names if name in values}


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(("kind", "mode"), [("fsdp2", ""), ("fsdp2_full", ""), ("fsdp2", "momentum")])
def test_another_number_of_processes_resumes(kind, mode, processes, ranks, tmp_path):
    ranks(2, train, kind, "SGD", tmp_path, mode=mode)
    ranks(processes, resume, kind, "SGD", *(tmp_path / f"step={step}.ckpt" for step in (3, 4)), mode=mode)
    for step in (3, 4):
        assert close(loaded(tmp_path / f"step={step}-resumed.ckpt"), loaded(tmp_path / "end.ckpt"), 1e-12)


ONE_PROCESS = {"single", "fsdp1_full"}  # over gloo torch crashes when several make FSDP1's full state dict


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ddp", "fsdp2"),
        ("fsdp2_full", "single"),
        ("single", "fsdp2"),
        ("fsdp1_full", "fsdp1"),
        ("fsdp1_full", "fsdp1_full"),
    ],
)
def test_another_strategy_resumes(before, after, ranks, tmp_path):
    ranks(1 if before in ONE_PROCESS else 2, train, before, "Adam", tmp_path)
    path = tmp_path / "step=4.ckpt"
    ranks(1 if after in ONE_PROCESS else 2, resume, after, "Adam", path, group=OTHER)
    tolerance = 1e-6 if "fsdp1" in after else 1e-12
    assert close(loaded(tmp_path / "step=4-resumed.ckpt"), loaded(tmp_path / "end.ckpt"), tolerance)


@pytest.mark.parametrize(("kind", "tool"), [("fsdp1", "pytorch"), ("fsdp1", "fabric"), ("fsdp2", "fabric")])
def test_a_folder_that_lightning_s_tools_have_made_one_file_holds_both_sets(kind, tool, ranks, program, tmp_path):
    ranks(2, train, kind, "Adam", tmp_path)
    folder, file = tmp_path / "step=4.ckpt", tmp_path / "one.ckpt"
    done = program("-m", f"lightning.{tool}.utilities.consolidate_checkpoint", folder, "--output_file", file)
    assert done.returncode == 0, done.stderr
    assert same(loaded(file), loaded(folder))
    if tool == "pytorch":  # the other has keys that a Trainer does not know
        ranks(1, resume, "single", "Adam", file)
        assert close(loaded(tmp_path / "one-resumed.ckpt"), loaded(tmp_path / "end.ckpt"), 1e-6)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "tp"])
def test_no_collective_at_a_sync_and_no_more_memory_than_a_shard(kind, ranks):
    ranks(2, check_laws, kind)


def test_fabric_resumes_sharded_slow_weights(ranks):
    expected = reference("fsdp2", "Adam")
    trained = [name for name, parameter in Sharded("Adam", "fsdp2").named_parameters() if parameter.requires_grad]
    for end in ranks(2, resume_in_fabric):
        for weights, values in end.items():
            assert distance(dict(zip(trained, values, strict=True)), {n: expected[weights][n] for n in trained}) < 1e-12


@pytest.mark.parametrize("processes", [2, 3])
def test_distributed_checkpoint_shards_slow_weights_by_itself(processes, ranks, tmp_path):
    end, *_ = ranks(2, resume_by_distributed_checkpoint, tmp_path, saves=True)
    for again in ranks(processes, resume_by_distributed_checkpoint, tmp_path, saves=False, group=OTHER):
        for weights in ("slow", "fast"):
            pairs = zip(again[weights], end[weights], strict=True)
            assert all((a - b).abs().max() < 1e-12 for a, b in pairs if a.numel())


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "fsdp2_full"])
def test_a_checkpoint_made_without_the_callback_starts_phi_from_its_weights(kind, ranks, tmp_path):
    ranks(2, start_from_a_foreign_checkpoint, kind, tmp_path / "foreign.ckpt")


def test_an_optimizer_without_state_and_mixed_precision(ranks, tmp_path):
    for kind, processes in (("fsdp2_plain", 2), ("fsdp2_bf16", 2), ("fsdp2_bf16", 1)):
        folder = tmp_path / f"{kind}{processes}"
        ranks(processes, train, kind, "SGD", folder)
        ranks(processes, resume, kind, "SGD", folder / "step=4.ckpt", group=OTHER)
        assert same(loaded(folder / "step=4-resumed.ckpt"), loaded(folder / "end.ckpt"))
    assert close(loaded(tmp_path / "fsdp2_plain2" / "end.ckpt"), reference("fsdp2_plain", "SGD"), 1e-12)
    assert close(loaded(tmp_path / "fsdp2_bf162" / "end.ckpt"), loaded(tmp_path / "fsdp2_bf161" / "end.ckpt"), 1e-6)
