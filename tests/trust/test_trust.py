"""Every case ends in an outcome that holds, and docs/trust.md says which."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from .cases import KINDS, Ask, Case, Verdict, _judge, is_sentence, run
from .kinds import CASES
from .table import COMMAND, DOCUMENT, generate, insert, line, written


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind.replace(' ', '-')}-{case.name}")
def test_right_or_said(case: Case) -> None:
    verdict = run(case)
    if verdict.outcome == "not tried":
        pytest.skip(verdict.text)
    assert verdict.outcome in case.accepted, f"{case.situation}: {verdict.outcome}: {verdict.text}"
    expected = line(case, verdict.outcome)
    assert expected in DOCUMENT.read_text(encoding="utf-8"), f"docs/trust.md lacks {expected!r}: run `{COMMAND}`"


def test_document_holds_the_table() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    outcomes = written(document)
    missing = [case.name for case in CASES if case.name not in outcomes]
    assert not missing, f"docs/trust.md lacks {missing}: run `{COMMAND}`"
    assert document == insert(document, generate(outcomes)), f"docs/trust.md differs from its table: run `{COMMAND}`"


def test_every_kind_has_members() -> None:
    counts = Counter(case.kind for case in CASES)
    assert all(counts[kind] >= 7 for kind in KINDS), counts
    assert len({case.situation for case in CASES}) == len(CASES)


# --- the judge itself


def judged(build: object) -> Verdict:
    case = Case("mean", ("right",), build)  # type: ignore[arg-type]  # functions of ask
    return run(case)


def test_the_judge_sees_a_wrong_number() -> None:
    assert judged(lambda ask: (ask(lambda: 1.0), 1.1, 1e-3)).outcome == "short"
    assert judged(lambda ask: (ask(lambda: 1.0), 1.0, 1e-3)).outcome == "right"


def test_the_judge_sees_another_librarys_exception() -> None:
    assert judged(lambda ask: ask(lambda: torch.ones(2) @ torch.ones(3))).outcome == "short"


@pytest.mark.parametrize("harm", ["weight", "buffer", "gradient", "mode", "attribute", "frozen", "random", "list"])
def test_the_judge_sees_what_was_changed(harm: str) -> None:
    def build(ask: Ask) -> None:
        model, kept = nn.BatchNorm1d(3), [1]

        def question() -> None:
            if harm == "weight":
                model.weight.data.add_(1.0)
            elif harm == "buffer":
                model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
            elif harm == "gradient":
                model.weight.grad = torch.zeros(3)
            elif harm == "mode":
                model.eval()
            elif harm == "attribute":
                model.eps = 0.5
            elif harm == "frozen":
                model.bias.requires_grad_(False)
            elif harm == "random":
                torch.rand(1)
            else:
                kept.append(2)

        ask(question)

    verdict = judged(build)
    assert verdict.outcome == "short"
    assert "changed" in verdict.text


def test_what_a_sentence_is() -> None:
    assert is_sentence("expected a positive number for rho, got -1; pass one above 0")
    assert not is_sentence("mat1 and mat2")
    assert not is_sentence("expected one line of at least six words,\nbut there are two")


def test_a_judgement_reads_the_case() -> None:
    assert _judge(Case("mean", ("right",), lambda ask: "warned"), Ask()).outcome == "warned"
