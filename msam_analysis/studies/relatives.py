"""Small workloads beside the digits and their convolutional network: other networks, other data of scikit-learn.

The perceptron and the vision transformer learn the digits of :mod:`msam_analysis.studies.digits`, wrong labels
included. The text is what scikit-learn's documentation says of twelve data sets: English prose with some markup, of
which the last quarter of each page is kept for the test. The table is its breast cancer data (569 tumours, 30
measurements each; UCI, Wolberg et al. 1995) with wrong labels among those trained on.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor, nn

from msam_analysis.studies.digits import datasets, divided
from msam_analysis.studies.networks import Network, char_transformer

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,"
"""The characters of the text; whatever stood between them in the original is one space."""

CONTEXT = 32
"""Characters in a sequence."""

# The pages that are the same, once reduced to the alphabet, in scikit-learn 1.7 and 1.9.
_PAGES = (
    *("breast_cancer", "covtype", "diabetes", "digits", "iris", "kddcup99", "lfw", "linnerud", "olivetti_faces"),
    *("rcv1", "species_distributions", "twenty_newsgroups"),
)

Batches = list[tuple[Tensor, Tensor]]


def reader() -> nn.Module:
    """Return a causal transformer of characters: width 32, two blocks of four heads; 28,352 parameters.

    Input ``(N, T)``; output ``(N, V, T)``, the classes second, as cross-entropy takes them.
    """
    network = char_transformer(len(ALPHABET), dim=32, depth=2, heads=4, context=CONTEXT)
    return Network(network.features, nn.Sequential(network.head, _ClassesSecond()))


class _ClassesSecond(nn.Module):
    """``(N, T, V)`` to ``(N, V, T)``."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, 2)


@lru_cache(maxsize=1)
def text() -> tuple[str, ...]:
    """Return the pages: letters in lower case, full stops and commas, with one space for whatever lies between."""
    folder = resources.files(datasets("text")) / "descr"
    return tuple(reduced((folder / f"{page}.rst").read_text(encoding="utf-8")) for page in _PAGES)


def reduced(original: str) -> str:
    """Return a text in the :data:`ALPHABET`."""
    return re.sub(r"[^a-z.,]+", " ", original.lower()).strip()


def sequences(texts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the texts in pieces, and the same one character on: places in the alphabet, int64 ``(N, CONTEXT)``.

    What does not fill a last piece of a text is left out.
    """
    inputs, targets = [], []
    for piece in texts:
        places = torch.tensor([ALPHABET.index(character) for character in piece])
        whole = (len(places) - 1) // CONTEXT * CONTEXT
        inputs.append(places[:whole].view(-1, CONTEXT))
        targets.append(places[1 : whole + 1].view(-1, CONTEXT))
    return torch.cat(inputs), torch.cat(targets)


def text_train() -> Batches:
    """Return the sequences of the first three quarters of every text, as one batch."""
    return [sequences(tuple(piece[: round(0.75 * len(piece))] for piece in text()))]


def text_test() -> Batches:
    """Return the sequences of the last quarter of every text, as one batch."""
    return [sequences(tuple(piece[round(0.75 * len(piece)) :] for piece in text()))]


@lru_cache(maxsize=1)
def table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 300 train inputs and labels (30 % flipped), 269 test inputs and labels; columns are standardised."""
    bunch = datasets("table").load_breast_cancer()
    return divided(torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target), 300, 0.3, dim=0)


def table_train() -> Batches:
    """Return the training set, flipped labels included, as one batch."""
    return [table()[:2]]


def table_test() -> Batches:
    """Return the test set as one batch."""
    return [table()[2:]]
