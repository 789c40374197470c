"""The page about a run says what its files say, and nothing in a file can do more than be read."""

import csv
import inspect
import json
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_lookahead import InnerOuterMonitor, Linear, LookaheadCallback, compare_weights, inner_loops, write_report
from lightning_lookahead.__main__ import main
from lightning_lookahead.evaluation.report.charts import Chart, Marks, Point, axis, thinned
from lightning_lookahead.evaluation.report.saved import DEFAULTS
from tests.helpers.classifier import Classifier
from tests.helpers.places import ROOT
from tests.helpers.runs import SeveralSteps, make_trainer

VOID = {"meta"}


class Page(HTMLParser):
    """What is in a page: its texts by element, its tables by the heading above them, the points of its charts."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.tables, self.charts, self.links = [], [], [], [], [], []
        self.text = Path(path).read_text(encoding="utf-8")
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "action"}]
        assert not any(name.startswith("on") for name in attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"th", "td"}:
            self.tables[-1][-1].append("")
        if "data-points" in attributes:
            self.charts.append(json.loads(attributes["data-points"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.open and self.open[-1] in {"th", "td"}:
            self.tables[-1][-1][-1] += data

    def of(self, tag):
        return [text for where, text in self.texts if where == tag]

    def table(self, *heading):
        """The rows of the tables with this heading, one after the other."""
        return [row for head, *rows in self.tables if head[: len(heading)] == list(heading) for row in rows]


class Logging(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def train(logger=None, model=None, **settings):
    """Two epochs of eight steps, with all that can be logged; the callback, the Trainer, the run's folder."""
    logger = logger or CSVLogger(".", name="log")
    options = {"k": 3, "alpha": Linear(0.5, 1.0, 4), "log_syncs": True, "log_distance": True, **settings}
    if model is None:
        options = {"monitor": InnerOuterMonitor(updates=6, every_n_syncs=3, save_csv=True), **options}
    callback = LookaheadCallback(**options)
    model = model or Logging()
    saving = ModelCheckpoint(save_top_k=-1, filename="{epoch}")
    limits = {"limit_val_batches": 1.0} if isinstance(model, Classifier) else {}
    trainer = make_trainer(callback, saving, logger=logger, max_epochs=2, log_every_n_steps=1, **limits)
    trainer.fit(model)
    return callback, trainer, Path(logger.log_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        callback, trainer, folder = train()
        comparison = compare_weights(trainer, trainer.lightning_module)
        (folder / "compared.json").write_text(comparison.to_json())
        yield callback, trainer, folder.absolute(), comparison


@pytest.fixture
def run(trained, tmp_path):
    """A folder of a run, to be changed."""
    return Path(shutil.copytree(trained[2], tmp_path / "run"))


def rows_of(history):
    words = {"inner": "fast", "outer": "slow"}
    return [[str(r.step), words[r.weights], repr(r.value), repr(r.loss)] for r in history]


def test_the_page_has_the_numbers_of_the_run(trained, run):
    callback, _, _, comparison = trained
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)

    history = callback.monitor.history
    assert [record.step for record in history][-1] == 15
    assert page.table("inner steps", "weights", "acc", "loss") == rows_of(history)
    drawn = [label for chart in page.charts for *_, label in chart if "weights" in label]
    assert sorted(drawn) == sorted(
        f"step {r.step}, {'fast' if r.weights == 'inner' else 'slow'} weights\nacc {r.value:.6g}\nloss {r.loss:.6g}"
        for r in history
    )
    loops = inner_loops(history)
    counts = [len(loops), *(sum(getattr(loop, name) for loop in loops) for name in ("fell", "raised", "recovered"))]
    assert page.table("inner steps", "whole loops")[-1][:5] == ["all", *map(str, counts)]

    with (run / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    for name in ("lookahead/alpha", "lookahead/distance", "lookahead/syncs", "train_loss", "accuracy", "loss"):
        expected = [[row["step"], repr(float(row[name]))] for row in logged if row[name]]
        assert expected
        assert page.table("step", name) == expected
    assert not page.table("step", "lookahead/inner_acc")  # among the windows already

    (slow,) = callback.slow_weights
    shown = dict(zip(page.of("dt"), page.of("dd"), strict=True))
    assert shown == {"k": "3", "alpha": repr(Linear(0.5, 1.0, 4)), "inner steps": "16", "syncs": str(slow.syncs)}
    assert page.table("setting")[:2] == [["k", "3", "5"], ["alpha", repr(Linear(0.5, 1.0, 4)), "0.5"]]
    assert [row[0] for row in page.table("setting")] == [
        "k", "alpha", *(name for name in DEFAULTS if name not in {"k", "alpha"})
    ]  # fmt: skip
    saved = page.table("file")
    assert saved == [
        [f"checkpoints/epoch={n}.ckpt", str(n), str(8 * n + 8), "0", str(8 * n + 8), syncs, since, "6", "slow weights"]
        for n, syncs, since in ((0, "2", "2"), (1, "5", "1"))
    ]
    versions = {name: (there, here) for name, there, here in page.table("")}
    lightning = torch.load(run / "checkpoints/epoch=1.ckpt", weights_only=True)["pytorch-lightning_version"]
    assert versions["Lightning"][0] == lightning
    assert versions["torch"] == ("", torch.__version__)

    compared = [row for row in page.table("metric") if row[-1] == "compared.json"]
    expected = comparison.to_dict()
    assert compared == [
        [name, f"{value:.6g}", f"{expected['fast'][name]:.6g}", f"{expected['difference'][name]:+.6g}", "compared.json"]
        for name, value in expected["slow"].items()
    ]
    assert "aside" not in page.tags


def test_slow_against_fast_at_the_syncs_of_the_windows(trained, run):
    history = trained[0].monitor.history
    pairs = [(a, b) for a, b in pairwise(history) if a.step == b.step]
    fast, slow = (sum(record.value for record in part) / len(pairs) for part in zip(*pairs, strict=True))
    rows = [row for row in Page(write_report(run)).table("metric") if row[0] == "acc"]
    number = f"the monitor: mean of {len(pairs)} syncs"
    assert rows == [["acc", f"{slow:.6g}", f"{fast:.6g}", f"{slow - fast:+.6g}", number]]


def test_the_page_is_one_file_that_loads_nothing_and_lets_only_its_own_script_run(run):
    page = Page(write_report(run))
    assert page.links == []
    assert "http" not in page.text.replace("http-equiv", "")
    assert "url(" not in page.text
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert "default-src 'none'" in page.text
    assert page.text.isascii()  # here: nothing in this run is not
    assert page.tags.count("title") == 1 + page.tags.count("desc")
    assert page.tags.count("figure") == page.tags.count("desc") <= page.tags.count("details")


def test_the_records_are_taken_from_a_checkpoint_or_the_logs_where_there_is_no_file(trained, run):
    expected = rows_of(trained[0].monitor.history)
    (run / "inner_outer.csv").unlink()
    page = Page(write_report(run))
    assert page.table("inner steps", "weights") == expected
    assert any("checkpoints/epoch=1.ckpt" in text for text in page.of("p"))
    shutil.rmtree(run / "checkpoints")
    page = Page(write_report(run))
    assert page.table("inner steps", "weights") == [[*row[:3], ""] for row in expected]  # loggers get no loss
    assert any("the logs" in text for text in page.of("p"))


def test_a_checkpoint_alone_has_a_page_beside_it(trained, run):
    checkpoint = run / "checkpoints" / "epoch=1.ckpt"
    path = write_report(checkpoint)
    assert path == run / "checkpoints" / "report.html"
    page = Page(path)
    assert page.table("inner steps", "weights", "metric", "loss") == rows_of(trained[0].monitor.history)
    assert [row[0] for row in page.table("file")] == ["epoch=1.ckpt"]


def test_a_folder_of_shards_is_a_checkpoint():
    path = shutil.copytree(ROOT / "tests" / "golden" / "shards.ckpt", "shards.ckpt")
    state = next(iter(torch.load(Path(path, "meta.pt"), weights_only=True)["callbacks"].values()))
    assert write_report("shards.ckpt") == Path("report.html")
    (row,) = Page("report.html").table("file")
    assert row[4:6] == [str(state["optimizers"][0]["steps"]), str(state["optimizers"][0]["syncs"])]


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "golden").glob("*.ckpt")), ids=lambda path: path.name)
def test_checkpoints_of_every_mode_and_version_have_a_page(path, tmp_path):
    assert Page(write_report(path, tmp_path / "page.html")).table("file")


def test_each_optimizer_has_its_counts_and_its_figures():
    _, _, folder = train(model=SeveralSteps(first=2), k=2)
    page = Page(write_report(folder))
    assert [row[3:6] for row in page.table("file")] == [
        ["0", "10", "5"], ["1", "5", "2"], ["0", "20", "10"], ["1", "10", "5"]
    ]  # fmt: skip
    assert {"lookahead/syncs/0", "lookahead/syncs/1"} <= set(page.of("h3"))
    assert dict(zip(page.of("dt"), page.of("dd"), strict=True))["inner steps"] == "20 / 10"


def test_a_run_that_logged_to_tensorboard(monkeypatch):
    callback, _, folder = train(TensorBoardLogger(".", name="board"))
    page = Page(write_report(folder))
    assert page.table("inner steps", "weights", "acc", "loss") == rows_of(callback.monitor.history)
    assert [float(value) for _, value in page.table("step", "lookahead/syncs")] == [n // 3 for n in range(1, 17)]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("tensorboard.")]:
        monkeypatch.setitem(sys.modules, name, None)
    page = Page(write_report(folder))
    assert any("pip install tensorboard" in text for text in page.of("p"))
    assert not page.table("step", "lookahead/syncs")
    assert page.table("inner steps", "weights", "metric", "loss") == rows_of(callback.monitor.history)


def test_of_many_figures_the_first_are_open(run):
    names = [f"metric_{n:02}" for n in range(11)]
    with (run / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", *names], range(12)])
    page = Page(write_report(run))
    assert [name for name in page.of("h3") if name.startswith("metric_")] == names
    assert "3 more" in page.of("summary")


def test_a_window_that_is_too_long_to_be_shown_is_cut_and_says_so(run):
    rows = [["step", "weights", "value", "loss"], *([step, "inner", 0.5, ""] for step in range(2100))]
    with (run / "inner_outer.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    page = Page(write_report(run))
    assert len(page.table("inner steps", "weights")) == 2000
    assert "The first 2000 of 2100 values" in page.of("summary")
    assert "No whole inner loop." in page.of("p")


def test_without_a_checkpoint_the_page_says_where_settings_are(run):
    shutil.rmtree(run / "checkpoints")
    page = Page(write_report(run))
    assert "There is no checkpoint here. Settings and counts are in checkpoints." in page.of("p")
    assert not page.table("setting")


EVIL = "</title></script><script>alert('1')</script>\"'&amp;<img src=x onerror=alert(1)>"


def test_names_and_texts_in_files_are_texts_on_the_page(run):
    with (run / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", EVIL, "lookahead/inner_" + EVIL], [0, 0.5, 0.25], [1, 0.75, 0.5]])
    (run / "compared.json").write_text(json.dumps({"slow": {EVIL: 1.0}, "fast": {EVIL: 2.0}}))
    (run / "hparams.yaml").write_text(EVIL)
    (run / "checkpoints" / "epoch=0.ckpt").rename(run / "checkpoints" / "\"'><script>alert(1)<!--.ckpt")
    (run / "checkpoints" / "<script>.ckpt").write_text("no checkpoint")
    checkpoint = torch.load(run / "checkpoints" / "epoch=1.ckpt", weights_only=True)
    checkpoint["pytorch-lightning_version"] = checkpoint["epoch"] = EVIL
    checkpoint["callbacks"]["LookaheadCallback"] |= {"exclude": [EVIL], "k": EVIL}
    torch.save(checkpoint, run / "checkpoints" / "epoch=1.ckpt")
    page = Page(write_report(run))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert EVIL in page.of("h3")
    assert EVIL in page.of("dd")
    assert EVIL in page.of("pre")
    assert page.table("metric")[0][0] == EVIL
    assert EVIL in page.text.replace(escape(EVIL), EVIL)
    assert EVIL not in page.text
    assert any(f"\n{EVIL} 0.75" in label for chart in page.charts for *_, label in chart)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("checkpoints/epoch=0.ckpt", b"", "it is empty"),
        ("checkpoints/epoch=0.ckpt", b"PK\x03\x04 cut", "it is cut off"),
        ("metrics.csv", b"\xff\xfe\x00", "can't decode byte"),
        ("metrics.csv", b"epoch,loss\n1,2\n", "has no column 'step'"),
        ("inner_outer.csv", b"step,value\n1,2\n", "it is not the monitor's file"),
        ("inner_outer.csv", b"step,weights,value,loss\n1,middle,2,3\n", "record (1, 'middle') is damaged"),
        ("inner_outer.csv", b"step,weights,value,loss\n1,inner\n", "not enough values"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(run, name, content, reason):
    (run / name).write_bytes(content)
    page = Page(write_report(run))
    (said,) = [n for n, (tag, text) in enumerate(page.texts) if tag == "b" and text == Path(name).name]
    assert reason in page.texts[said + 1][1]
    assert page.table("file")


def test_a_checkpoint_with_objects_of_ones_own_or_none_of_ours_is_named(run):
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, run / "objects.ckpt")
    torch.save({"state_dict": {}}, run / "plain.ckpt")
    marks = {"lookahead_version": 2, "optimizers": [{}], "eval_weights": "slow"}
    torch.save({"state_dict": {}, "callbacks": {"LookaheadCallback": marks}}, run / "marks.ckpt")
    page = Page(write_report(run))
    said = {text: page.texts[n + 1][1] for n, (tag, text) in enumerate(page.texts) if tag == "b"}
    assert said.keys() == {"objects.ckpt", "plain.ckpt", "marks.ckpt"}
    assert "weights_only=True does not allow" in said["objects.ckpt"]
    assert "was saved without it" in said["plain.ckpt"]
    assert "state_dict['steps'] is None" in said["marks.ckpt"]
    with pytest.raises(ValueError, match="was saved without it"):
        write_report(run / "plain.ckpt")


@pytest.mark.parametrize("value", [torch.ones(3), {"a": [1]}, float("nan"), "x" * 1000, 10**300])
def test_values_of_the_wrong_kind_in_a_checkpoint_stop_nothing(run, value):
    path = run / "checkpoints" / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["epoch"] = checkpoint["callbacks"]["LookaheadCallback"]["k"] = value
    torch.save(checkpoint, path)
    shown = Page(write_report(run)).table("setting")[0]
    assert shown[0] == "k"
    assert shown[1].startswith(str(value)[:300])


def test_a_checkpoint_with_other_settings_than_the_newest_says_so(run):
    path = run / "checkpoints" / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["LookaheadCallback"] |= {"k": 4, "eval_weights": "fast"}
    torch.save(checkpoint, path)
    page = Page(write_report(run))
    assert "checkpoints/epoch=0.ckpt was saved with k: 4, eval_weights: fast." in page.of("p")
    assert page.table("setting")[0] == ["k", "3", "5"]


def test_no_value_of_a_tensor_is_read(run):
    """The page needs counts: a checkpoint whose weights are damaged still has them, and a large one is read at once."""
    path = run / "checkpoints" / "epoch=0.ckpt"
    before = Page(write_report(path)).table("file")
    weights = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes()
    whole = path.read_bytes()
    assert whole.count(weights) == 1
    path.write_bytes(whole.replace(weights, bytes(len(weights))))
    assert Page(write_report(path)).table("file") == before


def test_values_that_are_not_finite_or_no_numbers_break_the_line_and_stay_in_the_table(run):
    rows = ["step,loss", "0,1.0", "1,nan", "2,inf", "3,hello", "4,1e308", "5,2.0", "x,3.0", "nan,4.0", "6"]
    (run / "metrics.csv").write_text("\n".join(rows))
    page = Page(write_report(run))
    assert page.table("step", "loss") == [["0", "1.0"], ["1", "nan"], ["2", "inf"], ["4", "1e+308"], ["5", "2.0"]]
    (chart,) = [chart for chart in page.charts if not any("weights" in label for *_, label in chart)]
    assert [label for *_, label in chart] == ["step 0\nloss 1", "step 5\nloss 2"]
    assert chart[0][0] == 0
    assert chart[1][0] == 1000
    (run / "metrics.csv").write_text("step,loss\n0,nan\n")
    assert "There is no finite value to draw." in Page(write_report(run)).of("p")


def test_a_long_series_is_thinned_to_what_can_be_seen():
    points = [Point(n, float(n % 7), "") for n in range(10_000)]
    points[4321] = Point(4321, 99.0, "")
    points[77] = Point(77, float("nan"), "")
    kept = thinned(points)
    assert len(kept) == 400
    assert points[4321] in kept
    assert [point.step for point in kept] == sorted(point.step for point in kept)
    assert thinned(points[:400]) == points[:400]


@pytest.mark.parametrize(
    "values",
    [[0.0], [1.0], [-3.0, -3.0], [0, 1e-320], [1e300, -1e300], [1e16, 1e16 + 2], [0.1, 0.7], [-1e-5, 2e-5], [5, 1e6]],
)
def test_an_axis_has_a_few_round_numbers_and_all_values(values):
    drawn = axis(values, 100, 0.06)
    ticks = drawn.ticks(5)
    assert 1 <= len(ticks) <= 6
    assert len({text for _, text in ticks}) == len(ticks)
    for value in (*values, *(number for number, _ in ticks)):
        assert -0.1 <= drawn.at(value) <= 100.1


def test_ticks_are_written_with_the_digits_that_they_need():
    assert axis([0, 60], 1).ticks(5, whole=True) == [(0, "0"), (20, "20"), (40, "40"), (60, "60")]
    assert [text for _, text in axis([0.91, 0.97], 1).ticks(5)] == ["0.92", "0.94", "0.96"]
    assert [text for _, text in axis([0, 1], 1).ticks(5, whole=True)] == ["0", "1"]
    assert [text for _, text in axis([0, 4e6], 1).ticks(5)] == ["0", "1e+06", "2e+06", "3e+06", "4e+06"]


def test_a_line_is_broken_at_a_point_without_a_place():
    points = [Point(n, value, "") for n, value in enumerate([1.0, 2.0, float("nan"), 1.0, 2.0])]
    svg = Chart("", "step", [Marks("plain", lines=[points])]).svg()
    (path,) = re.findall(r' d="([^"]*)"', svg)
    assert re.sub(r"[\d.]+ [\d.]+", "", path) == "MLML"


def test_the_defaults_are_those_of_the_callback():
    signature = inspect.signature(LookaheadCallback).parameters
    given = {name: signature[name].default for name in DEFAULTS}
    assert {**given, "exclude": []} == DEFAULTS
    state = LookaheadCallback(outer_momentum=0.5, share_gradients=True).state_dict()
    assert state.keys() - DEFAULTS.keys() == {"lookahead_version", "optimizers", "aliases"}
    assert DEFAULTS.keys() - state.keys() == {"share_gradients"}  # there where it is False


# -- the command


def command(*arguments, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-lookahead", "report", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, *capsys.readouterr()


def test_the_command_prints_where_the_page_is(run, tmp_path, capsys):
    assert command(run, capsys=capsys) == (0, f"{run / 'report.html'}\n", "")
    out = tmp_path / "my page.html"
    assert command(run, "--out", out, capsys=capsys) == (0, f"{out}\n", "")
    assert out.read_text() == (run / "report.html").read_text()
    assert command(run, "--out", out, capsys=capsys)[0] == 0  # a page is replaced


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "error: the following arguments are required: RUN"),
        (["run", "more"], "error: unrecognized arguments: more"),
        (["missing"], "error: run='missing' does not exist"),
        ([""], "error: run is empty"),
        (["empty"], "error: run='empty' holds neither logs nor checkpoints. Give a log folder"),
        (["logs"], "error: run='logs' holds neither logs nor checkpoints. Give one of the runs in it: version_0"),
        (["run/metrics.csv"], "error: run/metrics.csv cannot be read as a checkpoint"),
        (["run", "--out", "empty"], "error: [Errno 21] Is a directory: 'empty'"),
        (["run", "--out", "missing/report.html"], "error: [Errno 2] No such file or directory"),
        (["run", "--out", "run/metrics.csv"], "error: out='run/metrics.csv' is there and is no page"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(run, arguments, said, capsys):
    Path("empty").mkdir()
    Path("logs/version_0").mkdir(parents=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, err = command(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_command_needs_neither_lightning_nor_jsonargparse(run, bare_program):
    code = (
        "import sys; sys.modules['jsonargparse'] = None; sys.argv = ['x', 'report', sys.argv[1]]\n"
        "from lightning_lookahead.__main__ import main\n"
        "main()\n"
        "assert not {'lightning', 'pytorch_lightning', 'torchmetrics', 'yaml', 'matplotlib'} & sys.modules.keys()"
    )
    done = bare_program("-c", code, run)
    assert (done.returncode, done.stdout) == (0, f"{run / 'report.html'}\n"), done.stderr


# -- in a browser

HARNESS = """<!doctype html><body><iframe src="PAGE" style="width: WIDTHpx; height: 900px"></iframe>
<pre id="said"></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const { document: inside, innerWidth } = frame.contentWindow;
  const said = [inside.documentElement.scrollWidth <= innerWidth];
  for (const svg of inside.querySelectorAll("svg[data-points]")) {
    const [x, y, text] = JSON.parse(svg.dataset.points).at(-1);
    const box = svg.getBoundingClientRect();
    const at = { clientX: box.left + (x * box.width) / 1000, clientY: box.top + y };
    svg.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    const tip = inside.getElementById("tip");
    const place = tip.getBoundingClientRect();
    const shown = !tip.hidden && tip.textContent.includes(text) && place.left >= 0 && place.right <= innerWidth;
    svg.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
    said.push(shown && tip.hidden);
  }
  document.getElementById("said").textContent = JSON.stringify(said);
};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_values_that_are_pointed_at_and_complains_of_nothing(run, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not looked at")
    page = Page(write_report(run))
    Path("harness.html").write_text(HARNESS.replace("PAGE", "run/report.html").replace("WIDTH", str(width)))
    options = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --virtual-time-budget=5000"
    done = subprocess.run(
        [
            browser,
            *options.split(),
            f"--user-data-dir={Path.cwd() / 'profile'}",
            "--enable-logging=stderr",
            "--window-size=1400,1000",
            "--dump-dom",
            Path("harness.html").absolute().as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout)
    assert json.loads(said) == [True] * (1 + len(page.charts))
    assert "CONSOLE" not in done.stderr
