"""Random configurations of sharded strategies: each is trained, saved at every step and resumed from two of them."""

import random

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lookahead import Linear, load_weights
from tests.helpers.sharded import STEPS, fit, local

FOLDERS = {"fsdp1", "fsdp1_flat", "fsdp1_grad_op", "fsdp2", "fsdp2_hsdp", "tp"}


def configuration(kind, rng):
    # Without NAdam: in float64 it does not resume bit for bit by itself, as torch rounds what it loads of mu_product.
    optimizer = rng.choice(["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
    modes = ["none", "none"]
    modes += ["pullback"] if optimizer in {"SGD", "Adam", "AdamW"} else []
    modes += ["reset"] if optimizer in {"Adam", "AdamW", "RMSprop", "Adagrad"} else []
    options = {
        "k": rng.randint(1, 4),
        "alpha": rng.choice([0.3, 0.5, 1.0, Linear(0.3, 0.9, 2)]),
        "eval_weights": rng.choice(["slow", "slow", "fast"]),
        "pullback_momentum": rng.choice(modes),
        "start_step": rng.choice([0, 0, 1, 3]),
        "nonfinite": rng.choice(["raise", "skip"]),
        "slow_dtype": rng.choice([None, None, "float64"]),
        "outer_momentum": rng.choice([0.0, 0.9]),
        "outer_nesterov": rng.choice([True, False]),
    }
    if options["pullback_momentum"] == "pullback":
        options["outer_momentum"] = 0.0
    if "flat" not in kind:
        options["exclude"] = rng.choice([None, None, "net.0.bias", "*.bias"])
    settings = {"accumulate_grad_batches": rng.choice([1, 1, 2])}
    if kind in {"fsdp1", "fsdp2"}:
        settings["precision"] = rng.choice([None, None, "bf16-true"])
    return optimizer, options, settings


def train(kind, configured, *callbacks, ckpt_path=None):
    optimizer, options, settings = configured
    trainer, _, callback = fit(kind, optimizer, *callbacks, mode=options, ckpt_path=ckpt_path, **settings)
    (slow,) = callback.slow_weights
    values = {w: [local(value).detach().clone() for value in slow.values(w).values()] for w in ("slow", "fast")}
    assert trainer.global_step == slow.steps == STEPS, (slow.steps, trainer.global_step)
    return values, slow.syncs


def check(kind, seed, folder):
    """The resumed run has to be the uninterrupted one bit for bit."""
    rng = random.Random(seed)
    configured = configuration(kind, rng)
    where = f"{kind}, seed {seed}: {configured}"
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    values, syncs = train(kind, configured, every)
    for step in rng.sample(range(1, STEPS), 2):
        path = folder / f"step={step}.ckpt"
        resumed, again = train(kind, configured, ckpt_path=path)
        assert again == syncs, where
        for weights in ("slow", "fast"):
            same = [torch.equal(a, b) for a, b in zip(values[weights], resumed[weights], strict=True)]
            assert all(same), (where, step, weights, same)
        for weights in ("slow", "fast"):
            load_weights(path, weights)
        assert path.is_dir() == (kind in FOLDERS), where
