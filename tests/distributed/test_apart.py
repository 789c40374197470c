"""Ranks that train apart and meet at the sync, in real processes over gloo."""

import re
import warnings

import pytest
import torch

from lightning_lookahead import Linear, LookaheadCallback, load_weights
from tests.distributed.apart_worker import (
    buffers_at_syncs,
    compare,
    drifted,
    error_of,
    fail_alone,
    monitored,
    pointers,
    refused,
    resume,
    resume_elsewhere,
    sent,
    sync_now,
    sync_now_on,
    train,
    train_and_save,
    train_and_save_in_validation,
    twice,
    with_ddp,
)
from tests.helpers import apart
from tests.helpers.apart import Apart, differences, simulated
from tests.helpers.runs import both, equal, make_trainer

RULES = {
    "Local SGD": ({"alpha": 1.0}, {"alpha": 1.0}),
    "Lookahead": ({"alpha": 0.5}, {"alpha": 0.5}),
    "DiLoCo": ({"alpha": 0.7, "outer_momentum": 0.9}, {"alpha": 0.7, "momentum": 0.9}),
    "SlowMo": (
        {"alpha": 1.0, "outer_momentum": 0.5, "outer_nesterov": False},
        {"alpha": 1.0, "momentum": 0.5, "nesterov": False},
    ),
    "a schedule": (
        {"alpha": Linear(1.0, 0.4, 2), "outer_momentum": 0.6},
        {"alpha": Linear(1.0, 0.4, 2), "momentum": 0.6},
    ),
    "post-local": ({"alpha": 1.0, "start_step": 3}, {"alpha": 1.0, "share": 3}),
}


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_are_the_simulation_of_two_workers_bit_for_bit(rule, optimizer, ranks):
    options, expected = RULES[rule]
    thetas, phi, b = simulated(2, make=lambda: Apart(optimizer), **expected)
    found = ranks(2, train, optimizer=optimizer, **options)
    assert not equal(thetas[0], thetas[1])
    for own, theta in zip(found, thetas, strict=True):
        assert equal(own["theta"], theta)
        assert equal(own["phi"], phi)
        assert equal(own["b"][0], b)
    assert found[0]["validated"] == found[1]["validated"]
    assert len(found[0]["validated"]) > 1


def test_four_ranks_are_the_simulation_to_rounding_and_agree_on_phi_bit_for_bit(ranks):
    options, expected = RULES["DiLoCo"]
    thetas, phi, _ = simulated(4, **expected)
    found = ranks(4, train, **options, check_ranks=True)
    for own, theta in zip(found, thetas, strict=True):
        assert equal(own["phi"], found[0]["phi"])
        assert not differences(own["b"], found[0]["b"])
        for ours, exact in ((own["theta"], theta), (own["phi"], phi)):
            for mine, value in zip(ours, exact, strict=True):
                torch.testing.assert_close(mine, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Alike", {}),
        ("Alike", {"alpha": 0.7, "outer_momentum": 0.9}),
        ("Alike", {"unfinished_cycle": "sync", "outer_momentum": 0.5}),
        ("Alike", {"start_step": 2, "slow_dtype": "float64", "nonfinite": "restore"}),
        ("Alike", {"k": Linear(2, 4, 2), "pullback_momentum": "reset"}),
        ("AlikeGroups", {"pullback_momentum": "pullback"}),
        ("AlikeGroups", {"outer_momentum": 0.9}),
        ("AlikeNormed", {}),
        ("AlikeNormed", {"buffers": "sync", "start_step": 1}),
    ],
)
def test_two_ranks_with_the_same_data_are_one_process_bit_for_bit(kind, options, ranks):
    callback, module = LookaheadCallback(**{"k": 3, **options}), getattr(apart, kind)()
    make_trainer(callback, max_steps=10, limit_train_batches=3).fit(module)
    theta, phi = both(callback, module)
    with callback.use_weights("fast"):
        buffers = {name: value.clone() for name, value in module.named_buffers()}
    for own in ranks(2, train, kind, **options):
        assert equal(own["theta"], theta)
        assert equal(own["phi"], phi)
        assert not differences(own["fast buffers"], buffers)


def test_where_nothing_moves_nothing_is_moved(ranks):
    start = Apart().weights()
    for own in ranks(2, train, "Still", outer_momentum=0.9, alpha=0.7):
        assert equal(own["phi"], start)
        assert own["counts"] == [(10, 3, 1)]


def test_between_two_syncs_nothing_leaves_a_rank_but_lightnings_own_and_a_sync_sends_what_moves_once(ranks):
    found = ranks(2, sent, "Normed")
    lightnings = [("broadcast", [1])]  # whether a signal to end has come
    sync = [
        ("all_gather", [4]),  # where each rank is
        ("all_reduce", [6]),  # which parameters have moved
        ("all_reduce", []),  # whether one is not finite
        ("all_reduce", [34]),  # the parameters
        ("all_reduce", []),  # whether a statistic is not finite
        ("all_reduce", [8]),  # the statistics
        ("broadcast", [3]),  # the other buffer
        ("broadcast", [1]),  # the count of batches
    ]
    # that this rank has no other batch, where each rank is; how many batches each has, and whether that is certain
    epoch = [("broadcast", [1]), ("all_gather", [4]), ("all_gather", [4]), ("all_reduce", [])]
    rebuilt = [("broadcast", [7]), ("broadcast", [1])]  # DDP arranges its buckets once, in the second step
    own = {2: lightnings + rebuilt, 3: lightnings + sync, 5: lightnings, 6: lightnings + sync, 8: lightnings}
    own |= dict.fromkeys((4, 7, 10), epoch + lightnings) | {9: lightnings + sync}
    for of_rank in found:
        assert {step: of_rank[step - 1] for step in own} == {step: sorted(events) for step, events in own.items()}


def test_statistics_are_the_mean_at_a_sync_and_other_buffers_the_first_ranks(ranks):
    for before, after in zip(*(own for own in ranks(2, buffers_at_syncs)), strict=True):
        (own, shared), (other, others_shared) = before, after
        assert not differences(shared, others_shared)
        assert differences(own, other)
        mean = {name: own[name] / 2 + other[name] / 2 for name in ("net.1.running_mean", "net.1.running_var")}
        assert not differences(shared, {**own, **mean})


def test_slow_statistics_are_the_same_on_all_ranks(ranks):
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 2}
    first, second = ranks(2, train, "Normed", trainer=settings, buffers="sync")
    assert not differences(first["slow buffers"], second["slow buffers"])
    assert differences(first["fast buffers"], second["fast buffers"])


@pytest.mark.parametrize("buffers", ["keep", "sync"])
def test_a_statistic_that_is_infinite_on_one_rank_is_the_others_after_a_sync(buffers, ranks):
    first, second = ranks(2, train, "Unwell", trainer={"max_steps": 9}, buffers=buffers)
    for which in ("slow buffers", "fast buffers"):
        assert not differences(first[which], second[which])
        assert all(value.isfinite().all() for value in first[which].values())


def test_what_is_written_to_a_weight_that_stays_is_the_first_ranks(ranks):
    first, second = ranks(2, train, "Written")
    assert equal(first["phi"], second["phi"])
    assert not equal(first["phi"], Apart().weights())


@pytest.mark.parametrize("what", ["phi", "momentum"])
def test_a_rank_that_has_drifted_is_found(what, ranks):
    for said in ranks(2, drifted, what):
        assert "Parameter 'net.0.weight' differs between ranks" in said


def test_fits_one_after_the_other_leave_nothing_behind(ranks):
    (first, gone, groups), (second, _, _) = ranks(2, twice)
    for (sets, buffers), (others, others_buffers) in zip(first, second, strict=True):
        assert equal(sets[1], others[1])
        assert not differences(buffers, others_buffers)
        assert not differences(sets, first[0][0])
    assert gone == [True, True]
    assert groups == [groups[0]] * 3


KINDS = {
    "Adam": ("Apart", {"outer_momentum": 0.9, "alpha": 0.7}),
    "statistics and a schedule": ("Normed", {}),
    "statistics with two sets": ("Normed", {"buffers": "sync", "pullback_momentum": "pullback"}),
    "by hand": ("ByHand", {"outer_momentum": 0.5, "start_step": 2, "k": 4}),
    "a scaler": ("Scaled", {"alpha": 1.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_every_offset_in_new_processes_each_rank_is_what_it_would_have_been(kind, ranks, tmp_path):
    module, options = KINDS[kind]
    ends = ranks(2, train_and_save, tmp_path, module, **options)
    assert not equal(ends[0]["theta"], ends[1]["theta"]), "the last cycle must be unfinished, or the test shows less"
    steps = sorted(int(path.stem.partition("=")[2]) for path in tmp_path.glob("step=*.ckpt"))
    assert len(steps) > 5
    for end, resumed in zip(ends, ranks(2, resume, tmp_path, module, steps, group="other", **options), strict=True):
        for step, own in resumed.items():
            last = len(own["validated"])
            expected = {**end, "validated": end["validated"][len(end["validated"]) - last :]}
            assert not differences(own, expected), f"resumed from step {step}: {differences(own, expected)}"


@pytest.mark.parametrize("kind", ["Missing", "Scaled", "Halves"])
@pytest.mark.parametrize("rule", ["Lookahead", "DiLoCo"])
def test_a_step_that_one_rank_leaves_out_shifts_no_sync(kind, rule, ranks):
    options, expected = RULES[rule]
    made = getattr(apart, kind)
    thetas, phi, b = simulated(2, make=made, **expected)
    for own, theta in zip(ranks(2, train, kind, **options), thetas, strict=True):
        assert own["counts"] == [(10, 3, 1)]
        assert equal(own["theta"], theta)
        assert equal(own["phi"], [slow.to(fast) for slow, fast in zip(phi, theta, strict=True)])
        assert equal(own["b"][0], b)


TRAINERS = {
    "accumulation": ("Apart", {"accumulate_grad_batches": 2, "limit_train_batches": 2}, {}),
    "clipping": ("Apart", {"gradient_clip_val": 0.3}, {"clip": 0.3}),
    "mixed precision": ("Mixed", {"precision": "bf16-mixed"}, {}),
    "by hand": ("ByHand", {}, {"steps": 11}),
    "by hand, a sync within a batch": ("ByHand", {}, {"steps": 11, "k": 4}),
    "a stream": ("EvenStream", {"val_check_interval": 4}, {}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_however_it_is_trained_it_is_the_simulation_bit_for_bit(name, ranks):
    kind, settings, expected = TRAINERS[name]
    made = {"ByHand": Apart, "EvenStream": Apart}.get(kind, getattr(apart, kind))
    thetas, phi, _ = simulated(2, make=made, **expected)
    for own, theta in zip(ranks(2, train, kind, trainer=settings, k=expected.get("k", 3)), thetas, strict=True):
        assert equal(own["theta"], theta)
        assert equal(own["phi"], phi)


@pytest.mark.parametrize("setting", ["static_graph", "gradient_as_bucket_view"])
def test_settings_of_ddp_train_apart(setting, ranks):
    thetas, phi, _ = simulated(2)
    for own, theta in zip(ranks(2, with_ddp, **{setting: True}), thetas, strict=True):
        assert equal(own["theta"], theta)
        assert equal(own["phi"], phi)


def test_parameters_that_are_unfrozen_on_all_ranks_join(ranks):
    first, second = ranks(2, train, "Unfreezing", check_ranks=True, outer_momentum=0.5)
    assert equal(first["phi"], second["phi"])
    assert not equal(first["phi"][:1], Apart().weights()[:1])


def test_several_optimizers_sync_together(ranks):
    first, second = ranks(2, train, "Players", sync_optimizers="together", check_ranks=True)
    assert first["counts"] == second["counts"] == [(5, 1, 2)] * 2
    assert equal(first["phi"], second["phi"])
    assert not equal(first["theta"], second["theta"])


def test_a_sync_by_hand_on_all_ranks_is_the_mean(ranks):
    _, phi, _ = simulated(2, 4, k=4)
    for own in ranks(2, sync_now):
        assert equal(own["phi"], phi)


def test_a_sync_leaves_every_parameter_where_it_is(ranks):
    assert ranks(2, pointers) == [True, True]


ALONE = {"use_distributed_sampler": False, "limit_val_batches": 0}
"""Each rank has the loader that its module gives."""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Uneven", r"different numbers of training batches \(rank 0 has 5, another 4\)"),
        ("UnevenStream", r"different numbers of training batches \(rank 0 has more, another none\)"),
        ("Lazy", r"rank 0 is at the end of a batch after 2 steps; rank 1 is at the end of a batch after 1 steps"),
        ("Short", "The ranks have come apart: rank 0 is at .*rank 1 is at the end of an epoch"),
        ("ShortFirst", "The ranks have come apart: rank 0 is at the end of an epoch.*rank 1 is at"),
        ("Empty", "The ranks have come apart: rank 0 is at .*rank 1 is at the end of an epoch"),
        ("EmptyFirst", "The ranks have come apart: rank 0 is at the end of an epoch.*rank 1 is at"),
        ("Leaving", "rank 0 is at a sync after 3 steps; rank 1 is at the end of an epoch after 2 steps"),
        ("LeavingFirst", "rank 0 is at the end of an epoch after 2 steps; rank 1 is at a sync after 3 steps"),
        ("Stopping", "rank 0 is at a sync after 3 steps; rank 1 is at the end of an epoch after 2 steps"),
        ("StoppingFirst", "rank 0 is at the end of an epoch after 2 steps; rank 1 is at a sync after 3 steps"),
        ("Forgetful", r"rank 0 is at a sync after \d steps; rank 1 is at the end of a batch after \d steps"),
        ("UnfreezingLater", "The ranks train different parameters"),
    ],
)
def test_ranks_that_would_wait_for_each_other_for_ever_raise(kind, message, ranks):
    # Where one has ended its epoch, its last broadcast may be left: these ranks cannot go on to another test.
    for said in ranks(2, error_of, kind, trainer=ALONE, group=kind if "end of an epoch" in message else ""):
        assert re.search(message, said), said
        assert said.startswith("RuntimeError")


def test_they_raise_in_the_warm_up_and_within_an_epoch_that_is_resumed_too(ranks, tmp_path):
    for said in ranks(2, error_of, "Lazy", trainer=ALONE, start_step=4):
        assert "rank 0 is at the end of a batch after 2 steps; rank 1" in said
    ranks(2, train_and_save, tmp_path, "ByHand", trainer={**ALONE, "max_steps": 1})
    for said in ranks(2, error_of, "Lazy", trainer=ALONE, ckpt_path=f"{tmp_path}/step=1.ckpt"):
        assert "rank 0 is at the end of a batch after 2 steps; rank 1" in said


@pytest.mark.parametrize("own", [[0], [1]])
def test_a_sync_by_hand_on_one_rank_raises(own, ranks):
    expected = rf"sync_now\(\) was called on rank {own[0]}, and not on all ranks within a minute"
    with pytest.raises(AssertionError, match=expected):
        ranks(2, sync_now_on, own, group=f"only {own[0]} calls")


def test_a_rank_that_fails_alone_still_saves_what_it_has(ranks, tmp_path):
    ranks(2, fail_alone)
    callback, module = LookaheadCallback(k=3), Apart()
    with pytest.warns(UserWarning, match="share_gradients was False and is True"):
        make_trainer(callback, max_steps=4).fit(module, ckpt_path=tmp_path / "failed.ckpt")
    thetas, phi, _ = simulated(2, 4)
    theta, own = both(callback, module)
    assert equal(theta, thetas[0])
    assert equal(own, phi)


def test_what_is_not_finite_on_one_rank_is_so_for_all(ranks):
    for rank, said in enumerate(ranks(2, error_of, "Poisoned", outer_momentum=0.5)):
        own = "Parameter 'net.0.bias'" if rank else "A parameter on another rank"
        assert said.startswith(f"RuntimeError: {own} has a value that is NaN or infinite")
    first, second = ranks(2, train, "Poisoned", nonfinite="restore", outer_momentum=0.5)
    assert first["counts"] == second["counts"] == [(10, 2, 1)]
    assert equal(first["phi"], second["phi"])
    assert all(value.isfinite().all() for own in (first, second) for value in own["theta"])
    first, second = ranks(2, train, "Poisoned", nonfinite="skip", outer_momentum=0.5)
    assert first["counts"] == second["counts"] == [(10, 1, 1)]
    assert equal(first["phi"], second["phi"])
    assert all(value.isfinite().all() for value in first["theta"])


@pytest.mark.parametrize(
    ("kind", "strategy", "message"),
    [
        ("Apart", "fsdp", "strategy=AnyFSDPStrategy .* Take 'ddp'"),
        ("Apart", "fsdp2", "strategy=ModelParallelStrategy .* Take 'ddp'"),
        ("Apart", "unused", "find_unused_parameters=True .* freeze unused ones"),
        ("Apart", "hook", "A communication hook .* Leave ddp_comm_hook"),
        ("Apart", "post-local", "A communication hook .* ddp_comm_state out"),
        ("Normed", "norms", "SyncBatchNorm .* Leave sync_batchnorm=True out"),
        ("zero", "", "optimizer ZeroRedundancyOptimizer .* Give the optimizer inside"),
        ("Apart", "average", "EMAWeightAveraging .* Leave it out"),
        ("Players", "", "sync_optimizers='independently' .* Give 'together'"),
    ],
)
def test_what_would_send_something_in_each_step_is_refused(kind, strategy, message, ranks):
    for said in ranks(2, refused, kind, strategy):
        assert re.search(message, said), said


@pytest.mark.parametrize("options", [{"recalibrate_batch_norm": 1}, {"buffers": "sync"}, {}])
def test_what_was_saved_in_a_validation_goes_on_bit_for_bit(options, ranks, tmp_path):
    ends = ranks(2, train_and_save_in_validation, tmp_path, "Normed", **options)
    steps = sorted(int(path.stem.partition("=")[2]) for path in tmp_path.glob("step=*.ckpt"))
    assert len(steps) > 2
    for end, resumed in zip(ends, ranks(2, resume, tmp_path, "Normed", steps, group="other", **options), strict=True):
        for step, own in resumed.items():
            assert not differences(own, {**end, "validated": own["validated"]}), f"from step {step}"


def test_gradients_are_shared_from_phi_on_if_a_later_start_says_so(ranks, tmp_path):
    ranks(2, train_and_save, tmp_path, "Apart", trainer={"max_steps": 5})
    first, second = ranks(2, train, ckpt_path=f"{tmp_path}/step=5.ckpt", start_step=7, check_ranks=True)
    assert equal(first["phi"], second["phi"])


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_number_of_ranks_goes_on_from_phi_with_the_saved_optimizer_states_in_turn(
    before, after, ranks, tmp_path
):
    options = {"outer_momentum": 0.9, "alpha": 0.7}
    saved = ranks(before, train_and_save, tmp_path, "Apart", trainer={"max_steps": 5}, **options)
    found = ranks(after, resume_elsewhere, f"{tmp_path}/step=5.ckpt", group="other", **options)
    for rank, (start, end, said) in enumerate(found):
        assert len(said) == 1
        assert f"the checkpoint is of {before} ranks that train apart, and in this run there are {after}" in said[0]
        assert equal(start["phi"], saved[0]["phi"])
        assert equal(start["theta"], saved[0]["phi"])
        assert start["counts"] == [(5, 1, 0)]
        assert not differences(start["b"], saved[0]["b"])
        assert not differences(start["optimizers"], saved[rank % before]["optimizers"])
        assert equal(end["phi"], found[0][1]["phi"])
        assert end["counts"] == [(10, 2, 2)]


def test_the_file_goes_on_in_one_process_and_is_validated_without_the_callback(ranks, tmp_path):
    saved = ranks(2, train_and_save, tmp_path, "Apart", trainer={"max_steps": 5})
    path = tmp_path / "step=5.ckpt"
    for own in ({}, {"share_gradients": False}):
        callback, module = LookaheadCallback(k=3, **own), Apart()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            make_trainer(callback, max_steps=6).fit(module, ckpt_path=path)
        text = " ".join(str(warning.message) for warning in said)
        assert "of 2 ranks that train apart, and in this run none do from there on" in text
        assert ("share_gradients was False and is True" in text) == (not own)
        assert ("there is one process" in text) == bool(own)
        assert equal(both(callback, module)[1], saved[0]["phi"])
    module = Apart()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
        logged = make_trainer(limit_val_batches=1).validate(module, ckpt_path=path, verbose=False)
    assert equal(module.weights(), saved[0]["phi"])
    assert logged[0]["val_loss"] > 0
    assert equal(load_weights(path).values(), saved[0]["phi"])
    assert equal(load_weights(path, "fast").values(), saved[0]["theta"])


def test_a_comparison_measures_each_ranks_own_fast_weights(ranks):
    (found, first), (others, second) = ranks(2, compare)
    assert found == others
    for weights in ("slow", "fast"):
        assert found[weights]["val_loss"] == pytest.approx((first[weights] + second[weights]) / 2, rel=1e-6)
    assert first["fast"] != second["fast"]


def test_the_monitor_changes_nothing_and_sees_all_ranks(ranks):
    plain = ranks(2, train)
    (end, history, own), (other_end, other_history, others) = ranks(2, monitored)
    assert not differences([end, other_end], plain)
    assert history == other_history
    values = {record[0]: record[2] for record in history}
    for step in (1, 2, 4, 5, 7):
        assert values[step] == pytest.approx((own[step] + others[step]) / 2, rel=1e-6)
        assert own[step] != others[step]


def test_one_process_shares_with_nobody_and_says_so():
    callback, module = LookaheadCallback(k=3, share_gradients=False), Apart()
    with pytest.warns(UserWarning, match="there is one process, which shares with nobody"):
        make_trainer(callback, max_steps=10).fit(module)
    plain, other = LookaheadCallback(k=3), Apart()
    make_trainer(plain, max_steps=10).fit(other)
    assert not differences(both(callback, module), both(plain, other))
