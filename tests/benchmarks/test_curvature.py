"""What the benchmark of curvature computes from its measurements, and the references it compares with."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = "toy, trained, ragged"


def toy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10, bias=False))


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def curvature() -> Any:
    return importlib.import_module("curvature")


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("networks")
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setitem(module.SPECS, TOY, module.Spec(toy, epochs=2, samples=50, batch=20))
    return module


# --- references


def dense(model: nn.Module, criterion: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Every eigenvalue of the mean over samples, from torch's own Hessian, descending."""
    model = model.double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [p.shape for p in weights.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        point = {name: piece.view(shape) for name, piece, shape in zip(weights, pieces, shapes, strict=True)}
        sums = [len(x) * criterion(functional_call(model, point, (x.double(),)), y) for x, y in batches]
        total: Tensor = torch.stack(sums).sum() / sum(len(x) for x, _ in batches)
        return total

    hessian = torch.func.hessian(loss)(torch.cat([p.reshape(-1) for p in weights.values()]))
    values: Tensor = torch.linalg.eigvalsh(hessian).flip(0)
    return values


def network(wide: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, wide), nn.Tanh(), nn.Linear(wide, 2)).eval()


def ragged() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)
    return list(zip(x.split(9), y.split(9), strict=True))


@pytest.mark.parametrize("most", [3000, 0], ids=["dense", "ARPACK"])
def test_a_reference_is_what_torch_finds(networks: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_DENSE", most)
    model, criterion = network(16), nn.CrossEntropyLoss()
    found = networks.reference(model, criterion, ragged())
    values = dense(model, criterion, ragged())
    torch.testing.assert_close(found.largest, values[:5], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        found.magnitude, values[values.abs().argsort(descending=True)][:5], rtol=1e-9, atol=1e-12
    )
    assert found.method.startswith("dense" if most else "ARPACK")
    assert not torch.equal(found.largest, found.magnitude), "a case that tells the two apart"


def test_a_case_is_kept_and_read_again(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = networks.case(TOY, tiny=True)
    assert [len(y) for _, y in first.batches] == [20, 20, 1]
    monkeypatch.setattr(networks, "reference", None)  # may not be called again
    again = networks.case(TOY, tiny=True)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert torch.equal(first.reference.largest, again.reference.largest)
    assert not any(module.training for module in again.model.modules())
    assert len(list(networks.BUILD.iterdir())) == 1


def test_cases_are_as_many_and_as_different_as_promised(networks: Any) -> None:
    assert len(networks.SPECS) >= 8
    builders = {spec.build for spec in networks.SPECS.values()}
    assert len(builders) >= 4
    for name, spec in networks.SPECS.items():
        assert ("trained" in name) == (spec.epochs > 0)
        sizes = [len(y) for _, y in networks.batches(spec, spec.samples)]
        assert ("ragged" in name) == (len(set(sizes)) > 1)
        assert sum(sizes) == spec.samples


# --- figures


def test_errors_are_relative_and_in_place(curvature: Any) -> None:
    reference = torch.tensor([4.0, -2.0], dtype=torch.float64)
    assert curvature.errors(torch.tensor([4.0, -2.0]), reference) == [0, 0]
    assert curvature.errors(torch.tensor([4.4, -1.0]), reference) == pytest.approx([0.1, 0.5])
    assert curvature.errors(torch.tensor([-2.0, 4.0]), reference) == [1.5, 3]
    assert curvature.errors(torch.tensor([math.nan, -2.0]), reference) == [math.inf, 0]
    assert curvature.errors(torch.tensor([4.0]), reference) == [math.inf] * 2


def row(worst: float, milliseconds: float, ours: float = 10.0) -> dict[str, Any]:
    return {
        "errors": [worst / 10, worst],
        "worst": worst,
        "products": 20,
        "median_ms": milliseconds,
        "ratio": milliseconds / ours,
    }


GOOD = {
    "msam_analysis": row(1e-6, 10),
    "PyHessian": row(1e-2, 40),
    "curvlinops + eigsh": row(1e-8, 30),
    "curvlinops + eigsh, 1e-4": row(1e-5, 25),
    "hessian-eigenthings": row(1.0, 1),
    "hessian-eigenthings, 1e-4": row(1e-7, 12),
}
PRODUCTS = {"product, graph kept": {"ratio": 2.2}, "product, graph built anew": {"ratio": 4.0}}


def test_the_fastest_right_peer_is_right(curvature: Any) -> None:
    assert curvature.fastest_right_peer(GOOD) == "hessian-eigenthings, 1e-4"
    assert curvature.fastest_right_peer({"msam_analysis": row(0, 1), "PyHessian": row(1e-2, 1)}) is None
    assert curvature.fastest_right_peer(GOOD | {"PyHessian": {"failed": "not installed"}}) is not None


MISSES: list[tuple[dict[str, Any], str]] = [
    ({"msam_analysis": row(2e-4, 10)}, r"off by 2\.0e-04 \(target 0.0001\)"),
    ({"msam_analysis": {"failed": "broken"}}, "off by inf"),
    ({"PyHessian": row(1e-2, 29)}, r"takes 0\.34 of the time of PyHessian \(target: a third of it\)"),
    ({"PyHessian, to 1e-3": row(1e-3, 29)}, r"0\.34 of the time of PyHessian, to 1e-3 \(target: a third of it\)"),
    ({"curvlinops + eigsh": row(1e-9, 19)}, r"takes 0\.53 of the time of curvlinops \+ eigsh \(target: half of it\)"),
    ({"curvlinops + eigsh, 1e-4": row(1e-9, 19)}, r"0\.53 of the time of curvlinops \+ eigsh, 1e-4"),
    ({"hessian-eigenthings, 1e-4": row(1e-9, 9)}, r"takes 1\.11 of the time of hessian-eigenthings, 1e-4 .*fastest"),
]


def test_no_target_is_missed_when_all_are_met(curvature: Any) -> None:
    assert curvature.misses(GOOD, PRODUCTS) == []


@pytest.mark.parametrize(("change", "expected"), MISSES)
def test_every_target_can_be_missed(curvature: Any, change: dict[str, Any], expected: str) -> None:
    (found,) = curvature.misses(GOOD | change, PRODUCTS)
    assert re.search(expected, found), found


@pytest.mark.parametrize(("name", "ratio"), [("product, graph kept", 2.6), ("product, graph built anew", 4.3)])
def test_costly_products_are_missed_targets(curvature: Any, name: str, ratio: float) -> None:
    (found,) = curvature.misses(GOOD, PRODUCTS | {name: {"ratio": ratio}})
    assert f"a {name} takes {ratio:.2f} gradients" in found


def test_the_summary_counts_and_names_what_failed(curvature: Any) -> None:
    parts = {
        "a": {"tools": {"msam_analysis": row(1e-6, 10), "PyHessian": row(1e-2, 40)}, "products": PRODUCTS},
        "b": {
            "tools": {"msam_analysis": row(1e-5, 10), "PyHessian": {"failed": "not installed"}},
            "products": PRODUCTS,
        },
    }
    ours, theirs = curvature.summary(parts)
    assert (ours["right"], ours["networks"], ours["worst_error"]) == (2, 2, 1e-5)
    assert (theirs["right"], theirs["networks"], theirs["failed"]) == (0, 2, ["not installed"])
    assert (theirs["ratio"], theirs["lowest"], theirs["highest"]) == (4, 4, 4)
    table = curvature.markdown({"networks": parts})
    assert "| msam_analysis | 2 of 2 | 1e-05 | 1e-06 | 20 | 1.00 (1.00–1.00) |" in table
    assert "| product, graph kept | 2.20 (2.20–2.20) | 2 |" in table


def test_every_action_is_repeated_as_often_as_it_should() -> None:
    common, calls = importlib.import_module("common"), []
    actions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = common.interleaved(actions, {"a": 3, "b": 1}, "cpu", "cpu", warmup=1)
    assert "".join(calls) == "ab" + "ab" + "aa"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 1}
    calls.clear()
    common.interleaved(actions, 2, "wall", "cpu")
    assert "".join(calls) == "aaabbb" + "abab"


@pytest.mark.parametrize(
    ("errors", "ends", "expected"),
    [
        ([1e-2, 1e-4, 0.0], [False] * 3, 1),
        ([1e-2, 1e-2, 0.0], [False] * 3, 2),
        ([1e-2, 1e-2, 0.0], [False, True, False], 1),
        ([1e-4, 0.0, 0.0], [False] * 3, 0),
        ([1e-2, 1e-2, 1e-2], [False] * 3, 2),
    ],
    ids=["close", "closer", "at its end", "at once", "never"],
)
def test_a_tool_is_refined_until_it_is_close_or_at_its_end(
    curvature: Any, networks: Any, errors: list[float], ends: list[bool], expected: int
) -> None:
    right = torch.ones(2).double()
    of = networks.Case("toy", None, None, [], networks.Reference(right, right, ""))

    def attempt(number: int) -> Any:
        return lambda _: curvature.Answer(right + errors[number], number, ends[number])

    tool = curvature.Tool("math", "largest", attempt(0), (attempt(1), attempt(2)))
    answer, wrong, action, seconds = curvature.answer_of(tool, of)
    assert answer.products == action().products == expected
    assert max(wrong) == pytest.approx(errors[expected])
    assert seconds >= 0


def test_what_takes_long_is_repeated_less_and_never_measured_once(curvature: Any) -> None:
    options = argparse.Namespace(repetitions=5, seconds=1.0, clock="cpu")
    seconds = {curvature.OURS: 9.0, "quick": 0.01, "middling": 0.4, "slow": 1.5, "slowest": 2.5}
    calls: list[str] = []
    times = curvature.times_of({name: (lambda name=name: calls.append(name)) for name in seconds}, seconds, options)
    assert {name: len(values) for name, values in times.items()} == dict(zip(seconds, (5, 5, 2, 2, 2), strict=True))
    assert [calls.count(name) for name in seconds] == [5, 5, 2, 2, 1]
    assert times["slowest"][-1] == 2.5


# --- the scripts


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["curvature.py", *arguments])
    module.main()


def test_a_run_goes_on_where_it_was(
    curvature: Any, networks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        curvature.TOOLS, "hessian-eigenthings", curvature.Tool("no_such_package", "magnitude", curvature.ours())
    )

    def broken(of: Any) -> Any:
        raise ZeroDivisionError("theirs")

    monkeypatch.setitem(curvature.TOOLS, "PyHessian", curvature.Tool("math", "magnitude", broken))
    out = tmp_path / "figures.json"
    arguments = ["--tiny", "--resume", "--out", str(out), "--tools", "hessian-eigenthings", "PyHessian", "--networks"]
    run(curvature, monkeypatch, *arguments, TOY)
    figures = json.loads(out.read_text(encoding="utf-8"))["networks"]
    tools = figures[TOY]["tools"]
    assert tools["msam_analysis"]["worst"] <= 1e-4
    assert tools["hessian-eigenthings"] == {"failed": "not installed"}
    assert tools["PyHessian"] == {"failed": "ZeroDivisionError: theirs"}
    printed = capsys.readouterr().out
    assert "not installed" in printed
    monkeypatch.setattr(curvature, "case", None)  # may not be called again
    run(curvature, monkeypatch, *arguments, TOY)
    assert json.loads(out.read_text(encoding="utf-8"))["networks"] == figures
    run(curvature, monkeypatch, "--markdown", str(out))
    assert "| msam_analysis | 1 of 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["PyHessian", "curvlinops + eigsh, 1e-4"])
def test_peers_are_counted_and_leave_the_network(curvature: Any, networks: Any, name: str) -> None:
    pytest.importorskip(curvature.TOOLS[name].package)
    model = network()
    of = networks.Case("toy", model, nn.CrossEntropyLoss(), ragged(), None)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = curvature.TOOLS[name].run(of)
    assert answer.values.shape == (5,)
    assert answer.products >= 5
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_large_networks_are_measured_by_the_same_code(
    curvature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(curvature, monkeypatch, "--gpu", "--out", str(tmp_path / "none.json"))
    assert "skipped" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()
    run(curvature, monkeypatch, "--gpu", "--tiny", "--repetitions", "2", "--out", str(tmp_path / "tiny.json"))
    figures = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))["networks"]
    assert list(figures) == list(curvature.TINY)
    for part in figures.values():
        assert part["rows"]["1 eigenvalues"]["converged"]
        assert part["rows"]["product"]["of_gradient"] > 0


def test_the_large_networks_are_those_that_are_named(curvature: Any) -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in large.build().parameters()) for name, large in curvature.LARGE.items()}
    assert sizes["WRN-28-10, batch 512"] == 36_536_884
    assert sizes["ViT-B/16, batch 512"] == 86_567_656
    assert sizes["transformer, 1 G parameters"] == pytest.approx(1e9, rel=0.05)
