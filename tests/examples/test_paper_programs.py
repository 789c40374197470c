"""Each program of the paper as a real command: its smoke run leaves records and a figure, and is not done twice."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.places import EXAMPLES, environment

PAPER = EXAMPLES / "paper"
RUNS = {  # how many records a smoke run with one seed leaves
    "adaptive_alpha": 12,
    "cifar": 4 + 2 + 4 + 4 + 4,
    "figure1": 1,
    "figure10": 1,
    "language_model": 2 * (1 + 4) + 5,
    "momentum_at_sync": 4,
    "noisy_quadratic": 3 + 2,
    "outer_momentum": 2 * (1 + 2 + 3 * 6 + 3 * 5),
    "quadratic_momentum": 2 * 2 * 4,
    "robustness": 11,
    "workers": 2 * (2 + 1) + 2 * 4,
}
"""`imagenet.py` has tests of its own: it needs torchvision."""


def start(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, PAPER / f"{name}.py", *arguments],
        cwd=cwd,
        env=environment(COLUMNS="300"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All smoke runs, two at a time; what each has printed and left."""
    folder = tmp_path_factory.mktemp("smoke")

    def run(name):
        return start(name, "--smoke", "--seeds", "1", cwd=folder)

    with ThreadPoolExecutor(2) as both:
        return folder, dict(zip(RUNS, both.map(run, RUNS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_smoke_run_leaves_records_and_a_figure(smoke, name):
    folder, printed = smoke
    assert printed[name].returncode == 0, printed[name].stdout
    assert "Figure: outputs/paper" in printed[name].stdout
    out = folder / "outputs" / "paper"
    records = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    assert len(records) == RUNS[name]
    for record in records:
        assert set(record) == {"settings", "results", "seconds", "finished", "versions", "machine"}
        assert "seed" in record["settings"]
        assert {"torch", "lightning", "lightning_lookahead", "python"} <= set(record["versions"])
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / f"{name}.png").stat().st_size > 5000
    assert not [path for path in (out / name).iterdir() if path.is_dir()]  # of checkpoints


@pytest.mark.slow
def test_a_study_that_is_done_only_draws_again_and_another_seed_is_added(smoke):
    folder, printed = smoke
    (folder / "outputs/paper/momentum_at_sync.png").unlink()
    before = (folder / "outputs/paper/momentum_at_sync.jsonl").read_text()
    assert "momentum_at_sync 1/4" in printed["momentum_at_sync"].stdout
    again = start("momentum_at_sync", "--smoke", "--seeds", "2", cwd=folder)
    assert "momentum_at_sync 5/8" in again.stdout
    assert "momentum_at_sync 4/8" not in again.stdout
    after = (folder / "outputs/paper/momentum_at_sync.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 8
    assert (folder / "outputs/paper/momentum_at_sync.png").stat().st_size > 5000


@pytest.mark.slow
def test_digits_are_trained_on_in_their_own_size_for_as_long_as_is_said(tmp_path):
    done = start("momentum_at_sync", "--data", "digits", "--epochs", "1", "--seeds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    records = [json.loads(line) for line in (tmp_path / "outputs/paper/momentum_at_sync.jsonl").open()]
    sizes = {"data": "digits", "size": 0, "epochs": 1, "width": 8, "limit": 0}
    assert [record["settings"].items() >= sizes.items() for record in records] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", "no images in 'nowhere'. CIFAR: https://"),
        ("language_model", "nowhere"),
        ("noisy_quadratic", "--data nowhere: nowhere not found. A file holds one eigenvalue"),
    ],
)
def test_data_that_is_not_there_gives_one_line(tmp_path, name, message):
    stopped = start(name, "--data", "nowhere", cwd=tmp_path)
    assert stopped.returncode == 1
    (line,) = stopped.stdout.splitlines()
    assert line.startswith(f"{name}.py: ")
    assert message in line
    assert not (tmp_path / "outputs").exists()


def test_the_published_results_are_what_the_records_give(program):
    published = program(PAPER / "results.py", "--check")
    assert published.returncode == 0, published.stdout + published.stderr


@pytest.mark.slow
def test_published_results_that_were_changed_by_hand_are_found_and_mended(tmp_path, monkeypatch):
    shutil.copytree(PAPER, tmp_path / "paper")
    results = tmp_path / "paper" / "RESULTS.md"
    whole = results.read_text()
    assert whole.count("<!-- records: ") >= len(RUNS)
    results.write_text(whole.replace("| 0.03 | ", "| 0.03 | 0", 1))
    monkeypatch.setitem(globals(), "PAPER", tmp_path / "paper")
    changed = start("results", "--check", cwd=tmp_path)
    assert changed.returncode == 1
    assert "RESULTS.md is not what the records give" in changed.stdout
    assert start("results", cwd=tmp_path).returncode == 0
    assert results.read_text() == whole
