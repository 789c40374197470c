"""The language model of the paper's programs: texts that are read or refused, batches, and the network's dropouts."""

import math

import pytest
import torch

from examples.lab import text
from examples.lab.language import LanguageModel
from examples.lab.word_training import Settings, Windows, WordPredictor, train

WORDS = {"ptb.train.txt": " a b \n c a \n", "ptb.valid.txt": " b \n", "ptb.test.txt": " c c \n"}


@pytest.fixture
def treebank(tmp_path, monkeypatch):
    """A folder whose files are whole, and as long as is expected of them."""
    folder = tmp_path / "ptb"
    folder.mkdir()
    for name, words in WORDS.items():
        (folder / name).write_text(words)
    monkeypatch.setattr(text, "PTB", dict(zip(WORDS, (6, 2, 3), strict=True)))
    return folder


def test_the_treebank_is_read_with_a_mark_at_each_lines_end(treebank):
    found = text.load(str(treebank))
    assert found.vocabulary == ["<eos>", "a", "b", "c"]
    assert [part.tolist() for part in found[2:]] == [[1, 2, 0, 3, 1, 0], [2, 0], [3, 3, 0]]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("keep", [0, 3, -1])
def test_a_cut_treebank_file_is_named_in_one_line(treebank, name, keep):
    (treebank / name).write_text(WORDS[name][:keep])
    with pytest.raises(ValueError, match=f"{name} is not whole: .* words and line ends, not .*Get the Penn Treebank"):
        text.load(str(treebank))


def test_a_missing_file_or_folder_or_a_strange_word_is_told_in_one_line(treebank, tmp_path):
    (treebank / "ptb.test.txt").write_text(" c d \n")
    with pytest.raises(ValueError, match=r"ptb.test.txt has words that ptb.train.txt has not, such as 'd'"):
        text.load(str(treebank))
    (treebank / "ptb.test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ptb.test.txt is missing\. Get the Penn Treebank"):
        text.load(str(treebank))
    with pytest.raises(FileNotFoundError, match="no text in .*apt-get install bible-kjv"):
        text.load(str(tmp_path / "nowhere"))


def test_without_the_bible_program_one_line_says_where_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"the program 'bible' is missing\. .*apt-get install bible-kjv"):
        text.load("kjv")


def test_pythons_own_text_is_there_and_its_parts_differ():
    found = text.load("python")
    assert all(len(part) > 1000 for part in found[2:])
    assert len(found.train) > 5 * len(found.test)
    assert all(int(part.min()) >= 0 and int(part.max()) < len(found.vocabulary) for part in found[2:])
    assert 50 < text.unigram_perplexity(found) < len(found.vocabulary)


def test_the_perplexity_of_frequencies_is_that_of_add_one_counts():
    found = text.Text("", ["a", "b"], *map(torch.tensor, ([0, 0, 1], [0], [1, 0])))
    assert text.unigram_perplexity(found) == pytest.approx(math.sqrt(5 / 3 * 5 / 2))


def test_batches_go_through_each_row_in_order_and_targets_are_one_word_later():
    words = torch.arange(23)
    windows = Windows(words, rows=2, bptt=4)
    assert [tuple(x.shape) for x, _ in (windows[i] for i in range(len(windows)))] == [(4, 2), (4, 2), (2, 2)]
    x, y = (torch.cat(parts) for parts in zip(*(windows[i] for i in range(len(windows))), strict=True))
    assert x.t().tolist() == [list(range(10)), list(range(11, 21))]
    assert torch.equal(y, x + 1)


def network(**drops):
    torch.manual_seed(0)
    none = dict.fromkeys(("drop_output", "drop_hidden", "drop_input", "drop_words", "drop_weights"), 0.0)
    return LanguageModel(11, 6, 8, **{**none, **drops}).to(torch.float64)


def test_state_that_is_carried_over_gives_the_whole_sequence():
    net, words = network().eval(), torch.randint(11, (9, 3))
    whole, _ = net(words)
    first, state = net(words[:4])
    then, _ = net(words[4:], state)
    assert torch.allclose(torch.cat([first, then]), whole, rtol=0, atol=1e-14)  # other shapes round in another order


@pytest.mark.parametrize("drop", ["drop_output", "drop_hidden", "drop_input", "drop_words", "drop_weights"])
def test_each_dropout_acts_in_training_alone(drop):
    net, words = network(**{drop: 0.5}), torch.randint(11, (9, 3))
    assert not torch.equal(net(words)[0], net(words)[0])
    assert torch.equal(network()(words)[0], net.eval()(words)[0])


def test_weight_dropout_leaves_the_parameters_whole_and_reaches_their_gradients():
    net, words = network(drop_weights=0.5), torch.randint(11, (9, 3))
    weight = net.layers[0].weight_hh_l0
    before = weight.detach().clone()
    net(words)[0].sum().backward()
    assert net.layers[0].weight_hh_l0 is weight
    assert torch.equal(weight, before)
    dropped = (weight.grad == 0).double().mean()
    assert 0.3 < dropped < 0.7


def test_the_papers_network_has_its_size():
    assert sum(p.numel() for p in LanguageModel(10_000).parameters()) == 24_221_600


@pytest.mark.parametrize(
    "settings", [{}, {"k": 3}, {"average": 0.5}, {"optimizer": "adam", "lr": 0.01, "k": 3}], ids=str
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, settings, monkeypatch):
    python = text.load("python")
    small = {"embedding": 8, "hidden": 8, "epochs": 3, "batch_size": 10, "bptt": 20, "patience": 1, "limit": 1000}
    run = Settings("python", **{"lr": 5.0, **small, **settings})
    whole = train(run, python, tmp_path / "whole")

    begin = WordPredictor.on_train_epoch_start

    def stop_in_the_last_epoch(self):
        assert self.current_epoch < 2, "stopped"
        begin(self)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="stopped"):
        patch.setattr(WordPredictor, "on_train_epoch_start", stop_in_the_last_epoch)
        train(run, python, tmp_path / "part")
    assert train(run, python, tmp_path / "part") == whole
