"""Text as tensors of word indices: the Penn Treebank, the King James Bible, and Python's own language reference."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

END, UNKNOWN = "<eos>", "<unk>"
PARTS = ("train", "validation", "test")
PTB = {"ptb.train.txt": 929_589, "ptb.valid.txt": 73_760, "ptb.test.txt": 82_430}
"""Words and line ends in each file."""
VERSES = 31_102
TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[^\sa-z]")
"""A word, maybe with an apostrophe inside, or one character that is no letter."""
WHERE_PTB = "the Penn Treebank as T. Mikolov prepared it, a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt"
WHERE_KJV = "apt-get install bible-kjv bible-kjv-text"
WHERE = f"Get {WHERE_PTB}; or kjv: {WHERE_KJV}. Nothing to get: python."


class Text(NamedTuple):
    """A text in three parts, each a tensor of shape (words,) and type int64: places of its words in ``vocabulary``."""

    name: str
    vocabulary: list[str]
    train: Tensor
    validation: Tensor
    test: Tensor


def load(data: str) -> Text:
    """A text by name (``kjv``, ``python``) or from a folder with the Penn Treebank.

    - A folder: words as they stand in the files, and ``<eos>`` at each line's end.
    - ``kjv``: the King James Bible. Lower case, punctuation marks apart, verse numbers left out, ``<eos>`` at each
      verse's end. Every 20th chapter is for validation and the tenth after it for the test, so that all three parts
      come from all books. Words seen less than 10 times in training are ``<unk>``.
    - ``python``: the language reference that Python's ``help()`` shows, in the same way by paragraphs.

    Raises:
        FileNotFoundError: If nothing is there; says where to get it.
        ValueError: If a file is not whole.
    """
    if data == "python":
        paragraphs = [block for _, topic in sorted(topics.items()) for block in topic.split("\n\n")]
        return _split("Python's language reference", [[paragraph] for paragraph in paragraphs])
    if data == "kjv":
        return _split("King James Bible", _chapters())
    return _penn_treebank(Path(data))


def unigram_perplexity(text: Text) -> float:
    """Test perplexity of a model that knows only how often each word is in the training part."""
    # Each word counts once more, so that one which is in the other parts alone has a probability.
    counts = torch.bincount(text.train, minlength=len(text.vocabulary)) + 1.0
    return (counts.sum() / counts).log()[text.test].mean().exp().item()


def _split(name: str, documents: Sequence[Sequence[str]]) -> Text:
    """Documents of lines, dealt out to the three parts."""
    parts: list[list[str]] = [[], [], []]
    for number, lines in enumerate(documents, start=1):
        part = parts[{0: 1, 10: 2}.get(number % 20, 0)]
        part.extend(word for line in lines for word in (*TOKEN.findall(line.lower()), END))
    counts = Counter(parts[0])
    return _indexed(name, [UNKNOWN, *sorted(word for word, count in counts.items() if count >= 10)], parts)  # noqa: PLR2004 (as documented)


def _indexed(name: str, vocabulary: list[str], parts: Sequence[Sequence[str]]) -> Text:
    """A word that is not in the vocabulary is its ``<unk>``."""
    places = {word: place for place, word in enumerate(vocabulary)}
    unknown = places.get(UNKNOWN, 0)
    return Text(name, vocabulary, *(torch.tensor([places.get(word, unknown) for word in part]) for part in parts))


def _chapters() -> list[list[str]]:
    """The Bible's verses by chapter, without their numbers."""
    program = shutil.which("bible")
    if program is None:
        message = f"the program 'bible' is missing. {WHERE}"
        raise FileNotFoundError(message)
    # -f: one verse in a line, after book, chapter and verse number.
    said = subprocess.run([program, "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=False)  # noqa: S603 (no input from outside)
    if said.returncode:
        message = f"'bible' says {(said.stderr or said.stdout).strip()!r}: is its text there? {WHERE_KJV}"
        raise FileNotFoundError(message)
    chapters: dict[str, list[str]] = {}
    verses = [line.partition(" ") for line in said.stdout.splitlines()]
    for place, _, verse in verses:
        chapters.setdefault(place.partition(":")[0], []).append(verse)
    if len(verses) != VERSES:
        message = f"'bible' printed {len(verses):,} verses, not {VERSES:,}: install it again. {WHERE_KJV}"
        raise ValueError(message)
    return list(chapters.values())


def _penn_treebank(folder: Path) -> Text:
    if not any((folder / name).exists() for name in PTB):
        message = f"no text in {str(folder)!r}. {WHERE}"
        raise FileNotFoundError(message)
    parts = [_words(folder / name, size) for name, size in PTB.items()]
    vocabulary = sorted(set(parts[0]))
    for name, part in zip(PTB, parts, strict=True):
        if strangers := set(part) - set(vocabulary):
            message = (
                f"{folder / name} has words that ptb.train.txt has not, such as {min(strangers)!r}. Get {WHERE_PTB}."
            )
            raise ValueError(message)
    return _indexed("Penn Treebank", vocabulary, parts)


def _words(path: Path, size: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        message = f"{path} is missing. Get {WHERE_PTB}."
        raise FileNotFoundError(message) from error
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read ({error}). Get {WHERE_PTB}."
        raise ValueError(message) from error
    words = [word for line in lines[:-1] for word in (*line.split(), END)]
    if lines[-1] or len(words) != size:
        message = f"{path} is not whole: {len(words):,} words and line ends, not {size:,}. Get {WHERE_PTB}."
        raise ValueError(message)
    return words
