"""The ImageNet program as a real command, on images that it makes up, on one device and in two processes.

torchvision's wheel on PyPI holds parts compiled for torch's CUDA build. Beside a CPU build of torch it does not import,
and then neither does torchmetrics, so it must not be installed there. To run these tests all the same, unpack the wheel
outside of the environment and name the folder::

    pip install --no-deps --target FOLDER torchvision==0.28.0    # the one for torch 2.13
    TORCHVISION_FOLDER=FOLDER pytest -m slow tests/examples/test_imagenet.py

What is then missing are two detection operators, which are declared below; models, folders and transforms are real.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.paper import imagenet
from lightning_lookahead import newest_checkpoint
from tests.helpers.places import LAUNCHERS, environment

DECLARATIONS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture(scope="session")
def torchvision(tmp_path_factory):
    """An environment for commands in which torchvision imports."""
    unpacked, declared = os.environ.get("TORCHVISION_FOLDER"), tmp_path_factory.mktemp("declared")
    (declared / "sitecustomize.py").write_text(DECLARATIONS)  # Python imports this before the program
    for folders in ((unpacked,), (unpacked, declared)):
        own = environment(*filter(None, folders), COLUMNS="300")
        done = run("-c", "import torchvision", env=own)
        if done.returncode == 0:
            return own
    return pytest.skip(f"torchvision does not import here: {done.stderr.splitlines()[-1]}")


def run(*arguments, env):
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


def start(env, *arguments):
    return run(imagenet.__file__, *arguments, env=env)


def records(folder):
    path = folder / "imagenet.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def smoke(torchvision, tmp_path_factory):
    """The folder of a smoke run on one device, and what it has printed."""
    out = tmp_path_factory.mktemp("smoke")
    done = start(torchvision, "--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_a_smoke_run_leaves_a_pair_of_records_a_table_and_a_figure(smoke):
    out, printed = smoke
    sgd, lookahead = records(out)
    assert (sgd["settings"]["k"], lookahead["settings"]["k"], lookahead["settings"]["alpha"]) == (0, 5, 0.5)
    assert {**sgd["settings"], "k": 5} == lookahead["settings"]
    assert sgd["settings"].items() >= {"world": 1, "strategy": "auto", "precision": "32-true", "seed": 0}.items()
    for record in (sgd, lookahead):
        curves = record["results"]["curves"]
        assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(
            ("train_loss", "loss", "top1", "top5"), 2
        )
        assert {name: curve[-1] for name, curve in curves.items()} == {name: record["results"][name] for name in curves}
        assert all(top1 <= top5 <= 1 for top1, top5 in zip(curves["top1"], curves["top5"], strict=True))
        assert record["versions"]["torchvision"].startswith("0.")
    first, second = (record["results"]["curves"]["train_loss"] for record in (sgd, lookahead))
    assert first != second  # the first sync is in the first epoch
    assert "│ SGD " in printed
    assert "│ Lookahead " in printed
    assert (out / "imagenet.png").stat().st_size > 10_000
    assert not [path for path in (out / "imagenet").iterdir() if path.is_dir()]  # checkpoints are removed


@pytest.mark.slow
def test_what_is_recorded_is_not_done_again(smoke, torchvision):
    out, printed = smoke
    before = (out / "imagenet.jsonl").read_bytes()
    again = start(torchvision, "--smoke", "--out", out)
    assert again.returncode == 0
    assert "imagenet 1/2" in printed
    assert "imagenet 1/2" not in again.stdout
    assert (out / "imagenet.jsonl").read_bytes() == before


def first_epochs(folder):
    """The checkpoints of first epochs that are whole."""
    folders = [path.parent for path in folder.glob("imagenet/*/epoch=0.ckpt")]
    return [path for path in (newest_checkpoint(own, "epoch=0.ckpt") for own in folders) if path]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_after_its_last_epoch(smoke, torchvision, tmp_path):
    command = [sys.executable, imagenet.__file__, "--smoke", "--out", str(tmp_path)]
    with subprocess.Popen(command, env=torchvision, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (found := first_epochs(tmp_path)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not records(tmp_path), "it was to be killed within its first run"
    checkpoint = torch.load(found[0], weights_only=True)
    (curves,) = (state["values"] for state in checkpoint["callbacks"].values() if "values" in state)
    first = curves["loss"][0]
    curves["loss"][0] = 123.0  # shows that it went on from here
    torch.save(checkpoint, found[0])
    assert start(torchvision, "--smoke", "--out", tmp_path).returncode == 0
    resumed, _ = records(tmp_path)
    assert resumed["results"]["curves"]["loss"][0] == 123.0
    resumed["results"]["curves"]["loss"][0] = first
    assert resumed["results"] == records(smoke[0])[0]["results"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_one_network_and_record_it_once(strategy, torchvision, tmp_path):
    two = ("--devices", "2", "--strategy", strategy, "--accelerator", "cpu")
    done = start(torchvision, "--smoke", *two, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [record["settings"]["k"] for record in records(tmp_path)] == [0, 5]
    assert {record["settings"]["world"] for record in records(tmp_path)} == {2}
    assert done.stdout.count("Figure:") == 1


@pytest.mark.slow
def test_what_lightning_refuses_is_said_in_one_line(torchvision, tmp_path):
    done = start(torchvision, "--smoke", "--strategy", "fsdp1", "--accelerator", "cpu", "--out", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("imagenet.py: The strategy `fsdp` requires a GPU")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_cut_off_is_named_when_it_is_read(workers, torchvision, tmp_path):
    data = imagenet.make_images(tmp_path / "data")
    image = data / "train" / "class3" / "2.JPEG"
    image.write_bytes(image.read_bytes()[:1000])
    size = ("--epochs", "1", "--batch-size", "24")  # all images at once: nothing is trained before
    done = start(torchvision, "--data", data, *size, "--workers", str(workers), "--out", tmp_path / "out")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"imagenet.py: {image} is no whole image (")
    assert "https://image-net.org" in last
    assert "Traceback" not in done.stderr


def test_help_works_without_torchvision(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(sys, "argv", ["imagenet.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        imagenet.main()
    printed = capsys.readouterr().out
    for option in ("--data", "--seeds", "--smoke", "--out", "--strategy", "--devices", "--nodes", "--precision"):
        assert option in printed


def test_without_torchvision_the_command_says_in_one_line_what_to_install(tmp_path, program):
    without = "import sys; sys.modules['torchvision'] = None"
    command = f"{without}; from examples.paper import imagenet; sys.argv[0] = imagenet.__file__; imagenet.main()"
    done = program("-c", command, "--smoke", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "imagenet.py: torchvision is not installed: pip install torchvision\n"


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (None, "--data FOLDER is missing"),
        ([], "no folder '{}/train'"),
        (["train/cat"], "no folder '{}/val'"),
        (["train", "val/cat"], "{}/train has no folder for each class"),
        (["train/cat", "train/dog", "train/owl", "val/cat"], "{}/val lacks the class dog (and 1 more), which is in"),
        (["train/cat", "val/cat", "val/dog"], "{}/train lacks the class dog, which is in val"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_told_in_one_line(present, message, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for part in present or ():
        (data / part).mkdir(parents=True)
    given = [] if present is None else ["--data", str(data)]
    monkeypatch.setitem(sys.modules, "torchvision", None)  # told before it is missed
    monkeypatch.setattr(sys, "argv", ["imagenet.py", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        imagenet.main()
    line = stopped.value.code
    assert line.startswith(f"imagenet.py: {message.format(data)}")
    assert "https://image-net.org, after registration" in line
    assert "train/<class>/*.JPEG and val/<class>/*.JPEG" in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_of_a_missing_folder(tmp_path, program):
    done = program(imagenet.__file__, "--data", "nowhere", "--out", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("imagenet.py: no folder 'nowhere/train'. ImageNet (ILSVRC2012) is to be had at https://")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_only_the_first_process_of_all_keeps_the_records(name, monkeypatch):
    for launcher in (*LAUNCHERS, "SLURM_PROCID"):
        monkeypatch.delenv(launcher, raising=False)
    assert imagenet.leads()
    monkeypatch.setenv(name, "0")
    assert imagenet.leads()
    monkeypatch.setenv(name, "3")
    assert not imagenet.leads()


class Images(list):
    """What `runs` asks of an image folder."""

    classes = range(1000)


def runs(epochs):
    args = {"batch_size": 32, "devices": 8, "nodes": 2, "strategy": "ddp", "precision": "bf16-mixed", "seeds": 2}
    return imagenet.runs(Images("abc"), SimpleNamespace(smoke=False, epochs=epochs, data=Path("data"), **args))


@pytest.mark.parametrize(
    ("epochs", "decay"), [(60, (30, 48, 58)), (90, (30, 60, 80)), (30, (15, 24, 29)), (2, (1, 2)), (1, (1,))]
)
def test_the_schedule_is_the_papers_or_in_its_proportions(epochs, decay):
    assert {run.decay for run in runs(epochs)} == {decay}


def test_each_seed_gives_a_pair_of_runs_that_differ_in_lookahead_alone():
    pairs = runs(60)
    assert [(run.seed, run.k) for run in pairs] == [(0, 0), (0, 5), (1, 0), (1, 5)]
    assert len({dataclasses.replace(run, seed=0, k=0) for run in pairs}) == 1
    assert (pairs[0].world, pairs[0].images, pairs[0].classes, pairs[0].size) == (16, 3, 1000, 224)


def test_the_table_has_epochs_50_and_60_beside_the_papers_numbers():
    found = []
    for run in runs(60):
        curves = {name: [epoch / 100 + run.seed / 1000 for epoch in range(60)] for name in ("top1", "top5")}
        curves |= {name: [1.0] * 60 for name in ("loss", "train_loss")}
        results = {**{name: curve[-1] for name, curve in curves.items()}, "curves": curves}
        diverged = run.k == 5 and run.seed == 1
        found.append({"settings": dataclasses.asdict(run), "results": {"diverged": 7} if diverged else results})
    (table,) = imagenet.tables(found)
    assert table.headings[1:5] == ["top-1, epoch 50", "top-5, epoch 50", "top-1, epoch 60", "top-5, epoch 60"]
    sgd, lookahead, *paper = table.rows
    assert sgd == ["SGD", *["49.05 ± 0.07"] * 2, *["59.05 ± 0.07"] * 2, "1.0000 ± 0.0000", "1.0000 ± 0.0000"]
    assert lookahead[:2] == ["Lookahead", "49.00, 1 of 2 diverged"]
    assert paper == [
        ["SGD, in the paper", "74.43", "92.15", "75.15", "92.56", "", ""],
        ["Lookahead, in the paper", "75.13", "92.22", "75.49", "92.53", "", ""],
    ]
    training, accuracy = imagenet.draw(found).axes
    assert [line.get_label() for line in accuracy.lines] == ["SGD", "Lookahead"]
    assert len(training.lines[0].get_xdata()) == 60
