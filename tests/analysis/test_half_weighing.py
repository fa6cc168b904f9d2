"""What batches weigh is found in float32 where a model computes in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(ids))
        return out


class Insisting(Tagger):
    """Computes in bfloat16, whatever its weights are."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.head.weight.dtype != torch.bfloat16:
            raise RuntimeError("expected bfloat16")
        return super().forward(ids)


def loss(model: nn.Module, batch: Any) -> Tensor:
    value: Tensor = F.cross_entropy(model(batch["ids"]).flatten(0, 1).float(), batch["labels"].flatten())
    return value


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, left_out in ((4, 0.7), (3, 0.1)):
        labels = torch.randint(5, (rows, 6), generator=generator)
        ids = torch.randint(11, (rows, 6), generator=generator)
        labels[torch.rand(rows, 6, generator=generator) < left_out] = -100
        batches.append({"ids": ids, "labels": labels})
    return batches


@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}, {"dtype": torch.float32}])
def test_labels_are_counted(options: Any) -> None:
    torch.manual_seed(0)
    model = Tagger()
    if not options:
        model = model.bfloat16()
    o = ma.Objective(model, loss, data(), **options)
    assert o.loss().isfinite()
    assert dict(o.settings)["weighed by"] == "labels that count"


def test_a_model_that_insists_is_judged_as_it_is() -> None:
    torch.manual_seed(0)
    o = ma.Objective(Insisting().bfloat16(), loss, data())
    assert o.loss().isfinite()
