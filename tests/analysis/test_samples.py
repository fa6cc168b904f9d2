"""The same loss on other samples, and as a function of other parameters."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import msam_analysis as ma
from msam_analysis.objective.batches import Batches
from msam_analysis.objective.nested import tensors_of

from . import cases
from .cases import CASES, CONVNET, MLP, TAGGER, Case, concatenate, normal, split

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

chosen = st.lists(st.integers(0, 8), min_size=1, max_size=20)


def objective(case: Case, **options: Any) -> ma.Objective:
    return ma.Objective(case.model(), case.loss_fn, case.data(), **options)


def rows(data: Any, indices: list[int]) -> Any:
    """The chosen samples of one batch, taken by hand."""
    if isinstance(data, dict):
        return {key: value[indices] for key, value in data.items()}
    return tuple(value[indices] for value in data)


@each_case
@given(indices=chosen, batch_size=st.one_of(st.none(), st.integers(1, 12)))
@settings(max_examples=10)
def test_loss_and_derivatives_are_those_of_the_chosen_samples(
    case: Case, indices: list[int], batch_size: int | None
) -> None:
    whole = objective(case)
    chosen = whole.with_samples(torch.tensor(indices), batch_size=batch_size)
    by_hand = ma.Objective(case.model(), case.loss_fn, rows(concatenate(case.data()), indices))
    assert chosen.samples == len(indices)
    assert chosen.settings["samples"] == len(indices)
    assert float(chosen.loss()) == pytest.approx(float(by_hand.loss()), rel=1e-12)
    torch.testing.assert_close(chosen.gradient(), by_hand.gradient(), rtol=1e-10, atol=1e-12)
    v = normal(whole.size, seed=1)
    torch.testing.assert_close(chosen.hvp(v), by_hand.hvp(v), rtol=1e-10, atol=1e-11)


@given(indices=chosen, batch_size=st.one_of(st.none(), st.integers(1, 12)))
def test_samples_come_in_the_order_asked_for_in_ragged_batches(indices: list[int], batch_size: int | None) -> None:
    got = objective(TAGGER).with_samples(torch.tensor(indices), batch_size=batch_size).batches
    size = batch_size or 4  # of the largest batch
    full, rest = divmod(len(indices), size)
    assert got.sizes == [size] * full + [rest] * (rest > 0)
    expected = rows(concatenate(TAGGER.data()), indices)
    for key, value in concatenate(list(got)).items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_integers_of_any_width(dtype: torch.dtype) -> None:
    whole = objective(MLP)
    assert torch.equal(
        whole.with_samples(torch.arange(19, dtype=dtype)).loss(), whole.with_samples(all_of(whole)).loss()
    )


def all_of(objective: ma.Objective) -> Tensor:
    return torch.arange(objective.samples)


def test_all_samples_in_order_are_the_data() -> None:
    whole = objective(CONVNET)
    again = whole.with_samples(all_of(whole))
    assert torch.equal(whole.loss(), again.loss())
    assert torch.equal(whole.gradient(), again.gradient())
    assert whole.with_samples(all_of(whole), batch_size=1).batches.sizes == [1] * 19


def test_samples_of_samples() -> None:
    whole = objective(MLP)
    some = whole.with_samples(torch.tensor([3, 17, 5, 9]), batch_size=3)
    again = some.with_samples(torch.tensor([1, 1, 0]))
    assert torch.equal(again.loss(), whole.with_samples(torch.tensor([17, 17, 3]), batch_size=3).loss())


def test_the_original_is_what_it_was() -> None:
    whole = objective(MLP)
    before = whole.loss(), whole.samples, whole.layout
    whole.with_samples(torch.tensor([1, 2])).loss()
    whole.with_parameters("3.*").gradient()
    assert (whole.loss(), whole.samples, whole.layout) == before


def test_settings_follow() -> None:
    whole = objective(CONVNET, batchnorm="batch", dropout=True, second_derivatives="central")
    for derived in (whole.with_samples(all_of(whole)), whole.with_parameters(None)):
        assert derived.settings == whole.settings
    assert whole.with_parameters("8.*").settings == {**whole.settings, "parameters": 39}
    assert whole.with_samples(torch.tensor([4])).settings == {**whole.settings, "samples": 1, "batches": 1}


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_batchnorm_knows_the_new_batches(policy: Any) -> None:
    """Statistics are those of the batches that samples are put into."""
    model, indices = CONVNET.model(), torch.tensor([2, 11, 5, 7, 18, 0])
    whole = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm=policy)
    x, y = concatenate(CONVNET.data())
    for size in (6, 3):
        by_hand = ma.Objective(
            model, CONVNET.loss_fn, split([size] * (6 // size), x[indices], y[indices]), batchnorm=policy
        )
        assert torch.equal(whole.with_samples(indices, batch_size=size).loss(), by_hand.loss())


def test_neither_model_nor_data_is_copied_or_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            reads.append(index)
            return tuple(tensor[index] for tensor in self.tensors)

    whole = ma.Objective(MLP.model(), MLP.loss_fn, DataLoader(Counted(*concatenate(MLP.data())), batch_size=8))
    whole.examine()
    reads.clear()

    def refuse(*_: object) -> None:
        raise AssertionError("the model was copied")

    monkeypatch.setattr("copy.deepcopy", refuse)
    some = whole.with_samples(torch.tensor([1, 2, 3]))
    part = whole.with_parameters("0.*")
    assert some.gradient().isfinite().all()
    assert part.gradient().isfinite().all()
    assert part.batches is whole.batches
    assert some._evaluation.copy is part._evaluation.copy is whole._evaluation.copy
    monkeypatch.undo()
    assert reads == []


@pytest.mark.parametrize("cache_bytes", [0, 300, 700, 2**20])
def test_data_beyond_the_cache(cache_bytes: int) -> None:
    """A budget of a batch or two, and none: the data is read again, in several passes where it must be."""
    x, y = concatenate(MLP.data())
    whole = ma.Objective(
        MLP.model(), MLP.loss_fn, DataLoader(TensorDataset(x, y), batch_size=4), cache_bytes=cache_bytes
    )
    indices = torch.tensor([18, 0, 3, 3, 9, 14, 1, 7, 12])
    for size in (2, 4):
        some = whole.with_samples(indices, batch_size=size)
        for _ in range(2):
            assert torch.equal(torch.cat([batch[0] for batch in some.batches]), x[indices])
            assert torch.equal(torch.cat([batch[1] for batch in some.batches]), y[indices])


def test_batches_that_a_model_writes_to() -> None:
    """They are gathered anew, from data that are as they were."""
    x, y = concatenate(MLP.data())

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"].mul_(2)), batch["y"])

    whole = ma.Objective(MLP.model(), loss_fn, {"x": x, "y": y})
    some = whole.with_samples(torch.tensor([4, 2]))
    first = some.loss()
    assert torch.equal(some.loss(), first)
    assert torch.equal(whole.with_samples(torch.tensor([4, 2])).loss(), first)


# --- any structure

Named = namedtuple("Named", ["x", "y"])  # noqa: PYI024 - as users have them


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    weight: float = 1.0
    twice: bool = dataclasses.field(init=False, default=False)


STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple of three": (lambda x, y: (x, y, torch.tensor(1.0)), lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y, "scale": torch.tensor(2.0), "kind": "text"}, lambda b: (b["x"], b["y"])),
    "nested": (lambda x, y: {"in": [x, {"out": (y, None)}]}, lambda b: (b["in"][0], b["in"][1]["out"][0])),
    "data class": (Record, lambda b: (b.x, b.y)),
    "named tuple in a list": (lambda x, y: [Named(x, y)], lambda b: (b[0].x, b[0].y)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_batches_of_any_structure(name: str) -> None:
    build, take = STRUCTURES[name]
    data = MLP.data()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, y = take(batch)
        return F.cross_entropy(model(x), y)

    whole = ma.Objective(MLP.model(), loss_fn, [build(x, y) for x, y in data])
    assert float(whole.loss()) == pytest.approx(float(objective(MLP).loss()), rel=1e-14)
    some = whole.with_samples(torch.tensor([18, 3, 3]))
    (batch,) = some.batches
    assert type(batch) is type(build(*data[0]))
    assert torch.equal(some.loss(), objective(MLP).with_samples(torch.tensor([18, 3, 3])).loss())


def test_one_data_class_is_one_batch() -> None:
    def loss_fn(model: nn.Module, batch: Record) -> Tensor:
        return batch.weight * F.cross_entropy(model(batch.x), batch.y)

    x, y = concatenate(MLP.data())
    whole = ma.Objective(MLP.model(), loss_fn, Record(x, y, 2.0))
    assert float(whole.loss()) == pytest.approx(2 * float(objective(MLP).loss()), rel=1e-14)
    assert whole.samples == 19
    assert [tensor.shape for tensor in tensors_of(Record(x, y))] == [(19, 4), (19,)]


def test_what_has_no_rows_is_kept() -> None:
    batches = [{"x": x, "scale": torch.tensor(3.0), "name": "a", "none": None} for x, _ in MLP.data()]
    got = list(Batches(batches, device=torch.device("cpu"), dtype=None).take(torch.tensor([1, 2])))
    assert [batch["scale"] for batch in got] == [torch.tensor(3.0)]
    assert got[0]["name"] == "a"
    assert got[0]["none"] is None


def padded(lengths: list[int]) -> list[dict[str, Tensor]]:
    """Batches that are padded to a length of their own each."""
    return [{"x": normal(2, length, seed=length), "y": torch.zeros(2)} for length in lengths]


def sum_of_squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    weight: Tensor = next(model.parameters())
    return (weight[0, 0] * batch["x"]).square().sum(1).mean()


def test_ragged_padding_stays_where_samples_are_not_mixed() -> None:
    data = padded([3, 5, 5])
    whole = ma.Objective(nn.Linear(1, 1).double(), sum_of_squares, data)
    single = whole.with_samples(torch.tensor([5, 0, 2]), batch_size=1)
    assert [batch["x"].shape for batch in single.batches] == [(1, 5), (1, 3), (1, 5)]
    expected = torch.stack(
        [data[2]["x"][1].square().sum(), data[0]["x"][0].square().sum(), data[1]["x"][0].square().sum()]
    )
    weight = next(whole.model.parameters()).detach()
    assert float(single.loss()) == pytest.approx(float(weight**2 * expected.mean()), rel=1e-12)
    assert whole.with_samples(torch.tensor([2, 5, 3])).batches.sizes == [2, 1]
    with pytest.raises(ValueError, match=r"samples of different shapes .*\[\(3,\), \(5,\)\].*pad them .*batch_size=1"):
        whole.with_samples(torch.tensor([0, 5]))


# --- errors


def strings() -> Iterator[dict[str, Any]]:
    for index, (x, _) in enumerate(MLP.data()):
        yield {"x": x, "texts": ["one", "two"][index % 2]}


UNALIKE: dict[str, tuple[Any, str]] = {
    "another first dimension": ([(torch.ones(4, 2), torch.ones(3))], r"4 samples holds a tensor of shape \(3,\)"),
    "other strings": (list(strings()), "batches differ in what is not rows"),
    "other numbers": ([(x, y, torch.tensor(float(len(x)))) for x, y in MLP.data()], "batches differ in what is not"),
    "other keys": ([{"x": torch.ones(2, 2)}, {"z": torch.ones(2, 2)}], "batches differ in what is not rows"),
    "other types": ([(torch.ones(2, 2),), (torch.ones(2, 2).double(),)], "batches differ in what is not rows"),
    "rows here, none there": ([(torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(()))], "batches differ in"),
}


@pytest.mark.parametrize("name", UNALIKE)
def test_batches_without_samples_to_choose(name: str) -> None:
    data, message = UNALIKE[name]
    batches = Batches(data, device=torch.device("cpu"), dtype=None)
    with pytest.raises(ValueError, match=message):
        batches.take(torch.tensor([0]))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([1, 2], TypeError, "indices must be a tensor of integers, got list: pass torch.tensor"),
        (torch.tensor([1.0]), TypeError, "indices must be integers, got torch.float32"),
        (torch.ones(19, dtype=torch.bool), TypeError, r"got torch.bool: .*for a mask use mask.nonzero\(\)\[:, 0\]"),
        (torch.tensor([], dtype=torch.long), ValueError, r"name at least one sample, got shape \(0,\)"),
        (torch.tensor([[1, 2]]), ValueError, r"must be flat .*got shape \(1, 2\)"),
        (torch.tensor(3), ValueError, r"must be flat .*got shape \(\)"),
        (torch.tensor([0, 19]), IndexError, "no sample 19: expected indices from 0 to 18"),
        (torch.tensor([0, -1]), IndexError, "no sample -1: expected indices from 0 to 18"),
    ],
)
def test_indices_that_name_no_samples(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        objective(MLP).with_samples(indices)


@pytest.mark.parametrize("batch_size", [0, -2, 1.5, "8", True])
def test_batch_sizes(batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got"):
        objective(MLP).with_samples(torch.tensor([0]), batch_size=batch_size)


# --- parameters


@pytest.mark.parametrize("selection", ["8.*", ["0.*", "1.*"], lambda name, parameter: parameter.ndim == 1, None])
@pytest.mark.parametrize("policy", CONVNET.policies)
def test_other_parameters_of_the_same_loss(selection: Any, policy: Any) -> None:
    model, data = CONVNET.model(), CONVNET.data()
    derived = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy, parameters="3.*").with_parameters(selection)
    direct = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy, parameters=selection)
    assert derived.layout == direct.layout
    assert torch.equal(derived.point(), direct.point())
    assert torch.equal(derived.loss(), direct.loss())
    w = direct.point() + 0.1 * normal(direct.size, seed=2)
    assert torch.equal(derived.gradient(w), direct.gradient(w))
    assert torch.equal(derived.hessian(w) @ w, direct.hessian(w) @ w)


def test_blocks_of_the_hessian() -> None:
    whole = objective(MLP)
    H = whole.hessian() @ torch.eye(whole.size, dtype=torch.float64)
    start = 0
    for name, size in zip(whole.layout.names, whole.layout.sizes, strict=True):
        block = whole.with_parameters(name).hessian()
        stop = start + size
        got = block @ torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(got, H[start:stop, start:stop], rtol=1e-10, atol=1e-13)
        start = stop


def test_parameters_of_other_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).double())
    whole = ma.Objective(model, lambda m, b: m[1](m[0](b["x"]).double()).mean(), {"x": torch.ones(2, 4)})
    assert whole.dtype == torch.float64
    assert whole.with_parameters("0.*").dtype == torch.float32
    assert whole.with_parameters("0.*").gradient().dtype == torch.float32
    assert whole.with_parameters("1.*").dtype == torch.float64


def test_selections_of_nothing() -> None:
    whole = objective(MLP)
    with pytest.raises(ValueError, match="no parameter is named 'body"):
        whole.with_parameters("body.*")
    with pytest.raises(ValueError, match="selects nothing"):
        whole.with_parameters(lambda name, parameter: False)
    wrong: Any = [whole.model]
    with pytest.raises(TypeError, match="name patterns"):
        whole.with_parameters(wrong)


def test_subsets_of_both() -> None:
    whole = objective(cases.TRANSFORMER)
    one = whole.with_parameters("head.*").with_samples(torch.tensor([1, 2, 9]))
    other = whole.with_samples(torch.tensor([1, 2, 9])).with_parameters("head.*")
    assert torch.equal(one.gradient(), other.gradient())
    assert one.size == 27
