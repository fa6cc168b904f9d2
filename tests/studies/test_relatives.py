"""The small problems beside the digits: what they hold, and that it is always the same."""

from __future__ import annotations

import builtins
import pickle
from typing import Any

import pytest
import torch

from msam_analysis.studies import digits, relatives
from msam_analysis.studies.runs import Run
from msam_analysis.studies.workloads import DIGITS, RELATIVES, Workload

problems = pytest.mark.parametrize("problem", RELATIVES.values(), ids=list(RELATIVES))


def test_they_are_the_digits_relatives() -> None:
    assert set(DIGITS.relatives) == {"perceptron", "transformer", "text", "table"}


@problems
def test_networks_have_the_parameters_they_are_said_to_have(problem: Workload) -> None:
    count = sum(parameter.numel() for parameter in problem.network().parameters())
    assert f"{count:,}" in problem.description


@problems
def test_cross_entropy_and_argmax_take_the_output(problem: Workload) -> None:
    inputs, labels = problem.train()[0]
    output = problem.network()(inputs[:3])
    assert output.argmax(dim=1).shape == labels[:3].shape
    assert problem.criterion()(output, labels[:3]).ndim == 0


@problems
def test_runs_travel_to_a_worker_and_data_are_the_same_every_time(problem: Workload) -> None:
    runs = [Run(problem, name, 0) for name in problem.perturbations]
    identities = [run.identity for run in runs]
    assert len(set(identities)) == 3
    relatives.text.cache_clear()
    relatives.table.cache_clear()
    assert [run.identity for run in pickle.loads(pickle.dumps(runs))] == identities  # noqa: S301 - our own bytes


def test_pages_are_in_the_alphabet() -> None:
    pages = relatives.text()
    assert len(pages) == 12
    assert set("".join(pages)) <= set(relatives.ALPHABET)
    assert "optical recognition of handwritten digits" in " ".join(pages)
    assert not any("  " in page or page != page.strip() for page in pages)


def test_reduced_text() -> None:
    assert relatives.reduced(" Ten **Features**:\r\n\tA-b, c2.  ") == "ten features a b, c ."


def test_targets_are_the_next_characters() -> None:
    page = "".join(relatives.ALPHABET[number % 29] for number in range(3 * relatives.CONTEXT))
    inputs, targets = relatives.sequences((page, "too short"))
    assert inputs.shape == targets.shape == (2, relatives.CONTEXT), "a third piece would lack its last target"
    assert torch.equal(targets.flatten(), torch.tensor([(number + 1) % 29 for number in range(2 * relatives.CONTEXT)]))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_no_tested_sequence_was_trained_on() -> None:
    (trained, _), (tested, _) = relatives.text_train()[0], relatives.text_test()[0]
    assert len(trained) > 2.5 * len(tested) > 500
    known = {tuple(row) for row in trained.tolist()}
    assert not any(tuple(row) in known for row in tested.tolist())


def test_the_table_is_standardised_and_has_its_share_of_flipped_labels() -> None:
    from sklearn.datasets import load_breast_cancer

    inputs, labels, test_inputs, test_labels = relatives.table()
    assert (inputs.shape, test_inputs.shape) == ((300, 30), (269, 30))
    assert torch.allclose(inputs.mean(dim=0), torch.zeros(30), atol=1e-5)
    assert torch.allclose(inputs.std(dim=0), torch.ones(30), atol=1e-5)
    bunch = load_breast_cancer()
    raw = torch.tensor(bunch.data, dtype=torch.float32)
    # Standardising keeps the order of a column, and no two tumours agree in the order of all.
    order = torch.cat([inputs, test_inputs]).double().round(decimals=4).argsort(dim=0).argsort(dim=0)
    which = torch.cdist(order.double(), raw.argsort(dim=0).argsort(dim=0).double()).argmin(dim=1)
    assert which.unique().numel() == 569
    truth = torch.tensor(bunch.target)[which]
    assert int((truth[:300] != labels).sum()) == 90
    assert torch.equal(truth[300:], test_labels)


@pytest.mark.parametrize("load", [relatives.text, relatives.table, digits.load])
def test_without_scikit_learn(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return original(name, *rest, **more)

    load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"the (text|table|digits) workload needs scikit-learn: install"):
        load()
