"""The paper's language model in torch alone: an LSTM with the dropouts of AWD-LSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

State = list[tuple[Tensor, Tensor]]
"""Of each layer what it remembers, h and c, each of shape (1, batch, size of its output)."""


class LanguageModel(nn.Module):
    """Scores for the next word: an embedding, LSTM layers, and the embedding again to score the words.

    All layers have ``hidden`` units but the last, which has ``embedding``, as its output is compared with the words'
    embeddings (tied weights). The dropouts are those of Merity, Keskar and Socher, *Regularizing and Optimizing LSTM
    Language Models* (2017), section 4; each draws one mask for a call, the same at all times of its sequences.

    Args:
        words: Size of the vocabulary.
        embedding: Numbers for a word.
        hidden: Units of a layer.
        layers: At least 1.
        drop_output: Part of the last layer's outputs that is dropped.
        drop_hidden: Part of the outputs of the other layers.
        drop_input: Part of the embeddings' numbers.
        drop_words: Part of the vocabulary, whole words.
        drop_weights: Part of the weights from a layer's last output to its next.

    Shapes:
        words of shape (time, batch), int64 -> scores of shape (time, batch, words), and the state after them.
    """

    def __init__(
        self,
        words: int,
        embedding: int = 400,
        hidden: int = 1150,
        layers: int = 3,
        *,
        drop_output: float = 0.4,
        drop_hidden: float = 0.3,
        drop_input: float = 0.65,
        drop_words: float = 0.1,
        drop_weights: float = 0.5,
    ) -> None:
        super().__init__()
        self.drop_words, self.drop_weights = drop_words, drop_weights
        self.drop_between = [drop_input, *[drop_hidden] * (layers - 1), drop_output]
        sizes = [embedding, *[hidden] * (layers - 1), embedding]
        self.embedding = nn.Embedding(words, embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.layers = nn.ModuleList(map(nn.LSTM, sizes[:-1], sizes[1:]))
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x = self.embedding(words)
        if self.training:
            x = x * kept((len(self.embedding.weight), 1), self.drop_words, x)[words]
        after: State = []
        for layer, drop, before in zip(
            self.layers, self.drop_between, state or [None] * len(self.layers), strict=False
        ):
            x, remembered = self._through(layer, self._locked(x, drop), before)
            after.append(remembered)
        return nn.functional.linear(self._locked(x, self.drop_between[-1]), self.embedding.weight, self.bias), after

    def _through(
        self, layer: nn.LSTM, x: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not self.training:
            return layer(x, before)
        weight = layer.weight_hh_l0
        # The parameter itself stays in its place, whole, for the optimizer and for Lookahead.
        return functional_call(
            layer, {"weight_hh_l0": weight * kept(weight.shape, self.drop_weights, weight)}, (x, before)
        )

    def _locked(self, x: Tensor, drop: float) -> Tensor:
        """Dropout with one mask for all times of ``x``, of shape (time, batch, size)."""
        return x * kept((1, *x.shape[1:]), drop, x) if self.training else x


def kept(shape: tuple[int, ...], drop: float, like: Tensor) -> Tensor:
    """A mask of zeros, a part ``drop`` of it, and ``1 / (1 - drop)``, so that what it multiplies keeps its mean."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - drop).div_(1 - drop)
