"""What a step between two syncs costs, in calls: as many with any number of tensors, and none that nobody asked for."""

import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_lookahead import AdaptiveAlpha, LookaheadCallback
from tests.helpers.places import ROOT
from tests.helpers.runs import make_trainer

OURS = str(ROOT / "lightning_lookahead")
NEVER = 10**6


class Many(LightningModule):
    """So many trained tensors, in so many groups, with a gradient each."""

    def __init__(self, tensors=1, groups=1, frozen=0):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(2) for _ in range(tensors + frozen))
        for weight in self.weights[:frozen]:
            weight.requires_grad_(False)
        self.groups = groups

    def training_step(self, batch, batch_idx):
        return torch.stack([weight.sum() for weight in self.weights]).sum()

    def configure_optimizers(self):
        weights = list(self.weights)
        return torch.optim.SGD([{"params": weights[at :: self.groups]} for at in range(self.groups)], lr=0.1)


class Counter(Callback):
    """Counts calls of functions of this package in each batch, by name."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, *_):
        self.batches.append([])
        sys.setprofile(self.note)

    def note(self, frame, event, _):
        name = frame.f_code.co_name  # Lightning asks each callback for its state_key around each hook
        if event == "call" and frame.f_code.co_filename.startswith(OURS) and name != "state_key":
            self.batches[-1].append(name)

    def on_train_batch_end(self, *_):
        sys.setprofile(None)

    on_exception = on_train_batch_end


def calls(module, callback, steps=4, **options):
    """The names of the functions called in the last batch."""
    counter = Counter()
    trainer = make_trainer(callback, counter, max_steps=steps, **options)
    trainer.fit(module, DataLoader(range(steps), batch_size=None))
    assert trainer.global_step == steps
    return counter.batches[-1]


def test_an_ordinary_step_is_a_few_calls_whatever_the_number_of_tensors_and_groups():
    few = calls(Many(), LookaheadCallback(NEVER))
    assert len(few) <= 8
    assert not {"sync", "ended", "due", "total", "note_gradients", "figures"} & set(few)
    for module in (Many(tensors=300), Many(tensors=300, groups=50)):
        assert calls(module, LookaheadCallback(NEVER)) == few


def test_frozen_parameters_before_the_trained_ones_add_no_call():
    assert calls(Many(tensors=2, frozen=100), LookaheadCallback(NEVER)) == calls(Many(), LookaheadCallback(NEVER))


@pytest.mark.parametrize(
    "options",
    [
        {"log_syncs": True, "log_distance": True},
        {"check_ranks": True},
        {"alpha": AdaptiveAlpha("secant")},
        {"start_step": 2},
    ],
)
def test_what_an_option_needs_in_each_step_is_there_when_it_is_on_only(options):
    plain, asked = (calls(Many(), LookaheadCallback(NEVER, **given)) for given in ({}, options))
    assert set(plain) <= set(asked)
    assert (len(asked) > len(plain)) == ("start_step" not in options)


def test_loggers_get_one_call_for_all_keys_at_their_own_rhythm_and_nothing_is_computed_in_between(monkeypatch):
    sent, computed = [], []
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda _, metrics, step=None: sent.append((step, sorted(metrics))))
    from lightning_lookahead.trainer import fit, sync_log  # noqa: PLC0415 (patched here)

    monkeypatch.setattr(fit, "figures", lambda *a, **n: computed.append(1) or sync_log.figures(*a, **n))
    callback = LookaheadCallback(2, log_syncs=True, log_distance=True)
    calls(Many(), callback, steps=10, logger=CSVLogger("logs"), log_every_n_steps=5)
    keys = ["lookahead/distance", "lookahead/syncs"]
    assert [(step, found) for step, found in sent if "lookahead/syncs" in found] == [(4, keys), (9, keys)]
    assert len(computed) == 2


@pytest.mark.parametrize("logger", [False, True])
def test_the_progress_bar_shows_syncs_if_it_is_asked_to(logger):
    seen = []

    class Bar(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.progress_bar_metrics.get("lookahead/syncs"))

    callback = LookaheadCallback(2, log_syncs="progress_bar")
    options = {"logger": CSVLogger("logs") if logger else False}
    make_trainer(callback, Bar(), max_steps=6, log_every_n_steps=3, **options).fit(Many(), DataLoader(range(6)))
    assert seen == [None, None, 1.0, 1.0, 1.0, 3.0]


def test_a_place_to_log_to_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="log_syncs='bar' is unknown: give True, False or 'progress_bar'"):
        LookaheadCallback(log_syncs="bar")
