"""Files that were damaged, cut off or hold what is not allowed: each is refused in a sentence, or found whole."""

import contextlib
import copy
import os
import pickle
import random
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lookahead import LookaheadCallback, load_weights, newest_checkpoint
from tests.helpers.runs import Regression, equal, make_trainer, reference

JUNK = [None, 3, -1, "text", [], {}, [1], {"a": 1}, torch.ones(2), True]


def saved(path="run.ckpt", **settings):
    trainer = make_trainer(LookaheadCallback(k=3, **settings), max_steps=4)
    trainer.fit(Regression("Adam"))
    trainer.save_checkpoint(path)
    return path


def places(value, path=()):
    """Where something could be changed: the keys to every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_a_file_whose_structure_is_damaged_is_read_or_refused_in_a_sentence(seed):
    checkpoint = torch.load(saved(), weights_only=True)
    rng = random.Random(seed)
    ours = [p for p in places(checkpoint) if p[0] in {"callbacks", "state_dict", "optimizer_states"}]
    for _ in range(100):
        damaged = copy.deepcopy(checkpoint)
        *way, last = rng.choice(ours)
        parent = damaged
        for key in way:
            parent = parent[key]
        if rng.random() < 0.3:
            del parent[last]
        else:
            parent[last] = rng.choice(JUNK)
        torch.save(damaged, "damaged.ckpt")
        for weights in ("slow", "fast"):
            with contextlib.suppress(ValueError):  # and nothing else
                assert isinstance(load_weights("damaged.ckpt", weights), dict), (way, last)


def test_a_flipped_byte_of_a_weight_is_found():
    path = saved()
    for weights, values in (("slow", reference(4, optimizer="Adam")[1]), ("fast", reference(4, optimizer="Adam")[0])):
        for value in values:
            content = bytearray(open(path, "rb").read())  # noqa: PTH123, SIM115
            at = content.find(value.contiguous().numpy().tobytes())
            assert at > 0
            content[at + 3] ^= 16
            with open("flipped.ckpt", "wb") as file:  # noqa: PTH123
                file.write(content)
            with pytest.raises(ValueError, match="flipped.ckpt is damaged: 'net.* does not have the values"):
                load_weights("flipped.ckpt", weights)
            assert newest_checkpoint(".", "flipped*") is None


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing():
    path, rng = saved(), random.Random(0)
    whole = {weights: load_weights(path, weights) for weights in ("slow", "fast")}
    content = open(path, "rb").read()  # noqa: PTH123, SIM115
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        with open("flipped.ckpt", "wb") as file:  # noqa: PTH123
            file.write(flipped)
        for weights, values in whole.items():
            with contextlib.suppress(ValueError):  # and nothing else
                found = load_weights("flipped.ckpt", weights)
                assert list(found) == list(values)
                assert equal(found.values(), values.values())


def test_weights_that_were_changed_on_purpose_are_read_as_they_are():
    checkpoint = torch.load(saved(), weights_only=True)
    checkpoint["state_dict"]["net.0.bias"].add_(1.0)
    torch.save(checkpoint, "changed.ckpt")
    assert torch.equal(load_weights("changed.ckpt")["net.0.bias"], checkpoint["state_dict"]["net.0.bias"])


class Schedule:
    """A hyperparameter of one's own class."""


def test_an_object_that_is_not_allowed_is_told_from_damage_with_its_class_and_the_ways():
    path = saved()
    torch.save({**torch.load(path, weights_only=True), "hyper_parameters": {"schedule": Schedule()}}, "objects.ckpt")
    with pytest.raises(
        pickle.UnpicklingError, match="objects.ckpt is whole.*Schedule.*weights_only=False.*safe_globals"
    ):
        load_weights("objects.ckpt")
    assert equal(load_weights("objects.ckpt", weights_only=False).values(), load_weights(path).values())
    with torch.serialization.safe_globals([Schedule]):
        assert equal(load_weights("objects.ckpt").values(), load_weights(path).values())


class Outer:
    class Inner:
        """A class that pickle finds by way of another one."""


@pytest.mark.parametrize(
    ("thing", "name"), [(Outer.Inner(), "a class that is defined inside another"), (os.getcwd, "posix.getcwd")]
)
def test_what_cannot_be_allowed_alone_is_told_from_damage_too(thing, name):
    torch.save({**torch.load(saved(), weights_only=True), "hyper_parameters": {"thing": thing}}, "objects.ckpt")
    with pytest.raises(pickle.UnpicklingError, match=f"objects.ckpt is whole.*{name}.*weights_only=False.$"):
        load_weights("objects.ckpt")
    os.utime("run.ckpt", (0, 0))  # before the other by more than a clock's tick
    assert newest_checkpoint(".").name == "objects.ckpt"


def test_a_link_to_nowhere_and_a_file_of_an_old_torch_are_not_in_the_way():
    os.symlink("gone.ckpt", "last.ckpt")  # noqa: PTH211
    assert newest_checkpoint(".") is None
    content = torch.load(saved(), weights_only=True)
    torch.save(content, "old.ckpt", _use_new_zipfile_serialization=False)
    os.utime("run.ckpt", (0, 0))
    assert newest_checkpoint(".").name == "old.ckpt"
    assert equal(load_weights("old.ckpt").values(), load_weights("run.ckpt").values())
    with open("old.ckpt", "r+b") as file:  # noqa: PTH123
        file.truncate(3000)
    assert newest_checkpoint(".").name == "run.ckpt"


def test_an_empty_path_is_called_empty():
    with pytest.raises(ValueError, match="path is empty"):
        load_weights("")
    with pytest.raises(ValueError, match="folder is empty"):
        newest_checkpoint("")
    with pytest.raises(FileNotFoundError, match="folder='nowhere' does not exist: give"):
        newest_checkpoint("nowhere")


def test_the_newest_checkpoint_is_the_newest_that_is_whole_whatever_it_holds():
    every = ModelCheckpoint("folder", "{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(LookaheadCallback(k=3), every, max_steps=4).fit(Regression())
    assert newest_checkpoint("folder").name == "step=4.ckpt"
    for step in (1, 2, 3, 4):
        os.utime(f"folder/step={step}.ckpt", (step, step))  # a time of its own for each
    assert newest_checkpoint("folder").name == "step=4.ckpt"
    torch.save({"hyper_parameters": Schedule()}, "folder/objects.ckpt")
    assert newest_checkpoint("folder").name == "objects.ckpt"
    os.utime("folder/objects.ckpt", (0, 0))
    with open("folder/step=4.ckpt", "r+b") as file:  # noqa: PTH123
        file.truncate(1000)
    assert newest_checkpoint("folder").name == "step=3.ckpt"
    open("folder/step=3.ckpt", "wb").close()  # noqa: PTH123
    assert newest_checkpoint("folder", "step*").name == "step=2.ckpt"
    assert newest_checkpoint("folder", "*.pt") is None
    make_trainer(LookaheadCallback(k=3), max_steps=6).fit(Regression(), ckpt_path=newest_checkpoint("folder"))


def test_a_file_of_an_older_version_is_read_and_resumed():
    """The second set was in the optimizer's state then."""
    full = Regression("Adam")
    make_trainer(LookaheadCallback(k=3), max_steps=8).fit(full)
    checkpoint = torch.load(saved(), weights_only=True)
    fast = load_weights("run.ckpt", "fast")
    ours, state = checkpoint["callbacks"]["LookaheadCallback"], checkpoint["optimizer_states"][0]["state"]
    names = list(fast)
    ours["lookahead_version"] = 1
    (own,) = ours["optimizers"]
    for index, name in enumerate(names):
        state[index]["lookahead_fast"] = own["weights"]["fast"][name]
    ours["names"], ours["tied"], ours["statistics"] = [[[name] for name in names]], ours.pop("aliases"), [[]]
    own["checksums"] = [own["checksums"]["slow"][name] for name in names]
    del own["weights"], own["saved_with"], own["slow_dtype"]
    torch.save(checkpoint, "old.ckpt")
    assert equal(load_weights("old.ckpt", "fast").values(), fast.values())
    resumed = Regression("Adam")
    trainer = make_trainer(LookaheadCallback(k=3), max_steps=8)
    trainer.fit(resumed, ckpt_path="old.ckpt")
    assert equal(resumed.weights(), full.weights())
    assert not any("lookahead" in key for own in trainer.optimizers[0].state.values() for key in own)


def test_a_folder_of_shards_that_lacks_one_is_not_whole(tmp_path):
    from torch.distributed.checkpoint import save  # noqa: PLC0415

    folder = tmp_path / "shards.ckpt"
    save({"state_dict": {"weight": torch.ones(1000)}}, checkpoint_id=folder, no_dist=True)
    assert newest_checkpoint(tmp_path) is None  # what rank 0 writes last is missing
    torch.save({}, folder / "meta.pt")
    assert newest_checkpoint(tmp_path) == folder
    (shard,) = folder.glob("*.distcp")
    kept = tmp_path / "kept"
    shutil.copy(shard, kept)
    with shard.open("r+b") as file:
        file.truncate(500)
    assert newest_checkpoint(tmp_path) is None
    shutil.move(kept, shard)
    assert newest_checkpoint(tmp_path) == folder
    shard.unlink()
    assert newest_checkpoint(tmp_path) is None
