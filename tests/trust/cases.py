"""What a case is, what it may end in, and the right values, which never come from the package that is judged.

A case is a function of an :class:`Ask`. It builds a situation, computes the right value by plain autograd of the user's
own function, by differences of the user's own gradient, or in closed form, and asks the library through ``ask``::

    @case("mean", "right", "refused")
    def class_weights(ask):
        '''a criterion with class weights, in one batch and in two'''
        ...
        return ask(lambda: ma.Objective(net, criterion, batches).loss()), want, 1e-9

It returns what it got, what is right and a relative tolerance; or nothing, after assertions of its own; or the name of
its outcome. :func:`run` tells which of the three outcomes came: ``right`` (the number, and no warning of ours),
``refused`` (a ``raise`` of ours, one sentence) or ``warned`` (a number with a warning of ours). Everything else falls
short: a wrong number in silence, another library's exception, and whatever leaves the user's things changed.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import msam
import msam_analysis as ma

PACKAGES = [str(Path(str(package.__file__)).parent) for package in (msam, ma)]
WARN = warnings.warn
OUTCOMES = ("right", "refused", "warned")

# The kinds of fault: title, and what is done about it, in one sentence.
KINDS: dict[str, tuple[str, str]] = {
    "function": (
        "Value and derivative of different functions",
        "The loss is evaluated as its gradient is, so that both are of one function.",
    ),
    "copy": (
        "Not through the private copy",
        "What the loss reads of the outer model follows the weights that are measured; where it cannot, it is refused.",
    ),
    "no function": (
        "No function of the weights",
        "A loss that differs between two calls, or is not finite at the centre, is refused or returned as it is.",
    ),
    "mean": (
        "Not a mean over samples",
        "Known criteria are weighted by what they divide by; others are told to return (sum, count).",
    ),
    "counts": (
        "Counts guessed from shapes",
        "Sizes that contradict each other are no guess: the sentence says what to return.",
    ),
    "second": (
        "Wrong second derivatives",
        "The exact product is kept where it agrees with differences of the gradient, which else take over and say so.",
    ),
    "writes": (
        "Writes to what is the user's",
        "Weights, buffers, attributes, vectors and random state are left as they were, to the bit.",
    ),
    "tensors": (
        "Kinds of tensors",
        "Complex, sparse, lazy, empty, quantised and half-precision tensors are measured rightly or refused.",
    ),
    "dropout": (
        "Dropout by name",
        "What is random in training is found by what it does; what cannot be switched is said.",
    ),
    "buffers": (
        "Another network's buffers",
        "Statistics that do not belong to the weights are said to be so at every entrance.",
    ),
    "rounding": (
        "Rounding",
        "A number below what rounding resolves carries its resolution, or is refused or warned about.",
    ),
    "resolution": (
        "Resolution of a density",
        "The density lies within three of its standard errors of the exact one, or says that it is not resolved.",
    ),
    "stale": (
        "Stale results",
        "A measurement goes on only where loss and metrics at the centre are what they were.",
    ),
    "messages": (
        "Messages of torch where a sentence of ours belongs",
        "The sentence says what was expected, what came and what to do.",
    ),
}


class ShortError(Exception):
    """A case does not hold."""


class NotTried(Exception):  # noqa: N818 -- no error: a package that is optional is missing
    """A case needs a package that is not installed."""


Answer = tuple[Any, Any, float] | str | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One member of a kind."""

    kind: str
    accepted: tuple[str, ...]
    build: Callable[[Ask], Answer]

    @property
    def name(self) -> str:
        """Return the function's name."""
        return self.build.__name__

    @property
    def situation(self) -> str:
        """Return the first line of the function's docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0].removesuffix(".")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a case ended."""

    outcome: str  # one of OUTCOMES, "short" or "not tried"
    text: str


CASES: list[Case] = []


def case(kind: str, *accepted: str) -> Callable[[Callable[[Ask], Answer]], Callable[[Ask], Answer]]:
    """Register a function as a case of a kind, with the outcomes that hold."""
    assert kind in KINDS
    assert accepted
    assert set(accepted) <= set(OUTCOMES)

    def register(build: Callable[[Ask], Answer]) -> Callable[[Ask], Answer]:
        assert build.__doc__, build
        assert all(other.name != build.__name__ for other in CASES), build
        CASES.append(Case(kind, accepted, build))
        return build

    return register


def need(holds: object, text: str) -> None:
    """Fall short with a text unless something holds."""
    if not holds:
        raise ShortError(text)


# --- the user's things, as they are before and after a question


def _raw(tensor: Tensor) -> Any:
    """Return everything there is to a tensor, to the bit."""
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        return "no values"
    plain = tensor.detach()
    parts = [plain]
    if plain.layout != torch.strided:
        plain = plain.to_sparse_coo().coalesce() if plain.layout != torch.sparse_coo else plain.coalesce()
        parts = [plain.indices(), plain.values()]
    elif plain.is_quantized:
        parts = [plain.int_repr()]
    data = [
        part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"" for part in parts
    ]
    version = None if tensor.is_inference() else tensor._version
    gradient = _raw(tensor.grad) if tensor.is_leaf and tensor.grad is not None else None
    return id(tensor), version, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, gradient, data


def _state(thing: Any) -> Any:
    """Return a comparable picture of a thing."""
    if isinstance(thing, Tensor):
        return _raw(thing)
    if isinstance(thing, nn.Module):
        return {name or "itself": _module(module) for name, module in thing.named_modules()}
    if isinstance(thing, Mapping):
        return {repr(key): _state(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_state(value) for value in thing]
    if isinstance(thing, int | float | str | bool | None):
        return repr(thing)
    return id(thing)


def _module(module: nn.Module) -> Any:
    own = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters", "_buffers")}
    return type(module).__name__, _state(module._parameters), _state(module._buffers), _state(own)


def _collect(thing: Any, found: dict[int, Any]) -> None:
    """Gather the modules, tensors and containers that a function reaches."""
    if id(thing) in found or thing is None or isinstance(thing, int | float | str | types.ModuleType | type):
        return
    if isinstance(thing, nn.Module | Tensor | Mapping | list | tuple):
        found[id(thing)] = thing
    elif isinstance(thing, types.FunctionType) or type(thing).__module__.startswith("tests."):
        found[id(thing)] = None  # seen, and nothing to compare
    for value in _inside(thing):
        _collect(value, found)


def _inside(thing: Any) -> list[Any]:
    """Return what a thing holds."""
    if isinstance(thing, nn.Module):
        return [value for module in thing.modules() for value in vars(module).values() if callable(value)]
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        return [*cells, thing.__defaults__, thing.__kwdefaults__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, DataLoader | TensorDataset):
        return list(vars(thing).values())
    return list(vars(thing).values()) if type(thing).__module__.startswith("tests.") else []


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _surroundings() -> dict[str, Any]:
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": repr(np.random.get_state(legacy=False)),
        "python's random state": random.getstate(),
        "gradients on or off": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


class Ask:
    """Asks the library one question after the other, and watches what belongs to the user."""

    def __init__(self) -> None:
        self._seen: list[warnings.WarningMessage] = []
        self._ours: list[str] = []
        self.changed: list[str] = []
        self._things: dict[int, Any] = {}

    def __call__(self, question: Callable[[], Any]) -> Any:
        """Return the answer; what the question reaches (models, tensors, data) is compared before and after."""
        _collect(question, self._things)
        things = [thing for thing in self._things.values() if thing is not None]
        before, around = [_state(thing) for thing in things], _surroundings()
        try:
            with warnings.catch_warnings(record=True) as seen, mock.patch("warnings.warn", self._warn):
                warnings.simplefilter("always")
                try:
                    return question()
                finally:
                    self._seen += seen
        finally:
            for thing, state in zip(things, before, strict=True):
                if _state(thing) != state:
                    self.changed.append(f"{type(thing).__name__} ({_difference(state, _state(thing))})")
            after = _surroundings()
            self.changed += [key for key, value in around.items() if after[key] != value]

    def _warn(self, message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **more: Any) -> None:
        """Warn as ever, and take down what a line of ours says, whichever line it names as its place."""
        speaker = sys._getframe(1).f_code.co_filename
        if any(speaker.startswith(package) for package in PACKAGES):
            self._ours.append(str(message))
        WARN(message, category, stacklevel + 1, source, **more)

    @property
    def said(self) -> list[str]:
        """Return the warnings of ours that reached the user."""
        return [str(one.message) for one in self._seen if str(one.message) in self._ours]


def _difference(before: Any, after: Any) -> str:
    """Name the modules whose state differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        return ", ".join(str(key) for key in before if before[key] != after.get(key)) or "its parts"
    return "its value"


def refusal(error: BaseException) -> bool:
    """Return whether an exception was raised by a ``raise`` of ours, and not by torch in one of our lines."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = any(last.filename.startswith(package) for package in PACKAGES)
    return inside and (last.line or "").lstrip().startswith("raise")


def is_sentence(message: str) -> bool:
    """Return whether a message can be read: one line that says something, one sentence or two short ones."""
    ends = re.findall(r"[.!?] [A-Z]", message)
    return "\n" not in message and len(message.split()) >= 6 and len(message) <= 600 and len(ends) <= 1


# --- running


def _close(got: Any, want: Any, tolerance: float) -> bool:
    a, b = (torch.as_tensor(value).detach().to(torch.float64).reshape(-1) for value in (got, want))
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a[~a.isnan()], b[~b.isnan()]
    scale = float(b.abs().max()) if b.numel() and float(b.abs().max()) > 0 else 1.0
    return bool(((a - b).abs() <= tolerance * scale).all())


def _shown(value: Any) -> str:
    numbers = torch.as_tensor(value).detach().double().reshape(-1).tolist()
    return " ".join(f"{number:.6g}" for number in numbers[:6]) + (" ..." if len(numbers) > 6 else "")


def _judge(one: Case, ask: Ask) -> Verdict:
    try:
        answer = one.build(ask)
    except ShortError as error:
        return Verdict("short", str(error))
    except NotTried as error:
        return Verdict("not tried", str(error))
    except Exception as error:  # noqa: BLE001 -- whichever it is, it is judged
        if not refusal(error):
            return Verdict("short", f"not a refusal of ours: {type(error).__name__}: {str(error)[:200]}")
        message = str(error)
        return Verdict("refused" if is_sentence(message) else "short", message)
    said = ask.said
    if isinstance(answer, str):
        return Verdict(answer, "; ".join(said))
    if answer is not None and not _close(*answer):
        wrong = f"got {_shown(answer[0])}, right is {_shown(answer[1])}"
        return Verdict("warned" if said else "short", f"{wrong}; {'; '.join(said)}")
    return Verdict("warned" if said else "right", "; ".join(said))


def run(one: Case) -> Verdict:
    """Return how a case ends; the global random state is that from before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    ask = Ask()
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings():  # torch's, about what the user's own function does outside of our questions
            warnings.simplefilter("ignore")
            verdict = _judge(one, ask)
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    if ask.changed:
        return Verdict("short", f"changed: {'; '.join(ask.changed)}; else {verdict.outcome}: {verdict.text}")
    return verdict


# --- the right values


class Truth:
    """Loss, gradient and Hessian of the user's own function: plain autograd, and differences of its gradient."""

    def __init__(self, loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> None:
        self.function = loss
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]

    @property
    def loss(self) -> Tensor:
        """Return the loss."""
        return self.function().detach().double()

    @property
    def gradient(self) -> Tensor:
        """Return the gradient as a flat vector."""
        parts = torch.autograd.grad(self.function(), self.parameters, allow_unused=True)
        filled = [torch.zeros_like(p) if part is None else part for p, part in zip(self.parameters, parts, strict=True)]
        return torch.cat([part.to_dense().detach().reshape(-1) for part in filled]).double()

    def at(self, displacement: Tensor, ask: Callable[[], Tensor]) -> Tensor:
        """Return an answer at displaced weights, which are then what they were."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        pieces = displacement.split([parameter.numel() for parameter in self.parameters])
        try:
            with torch.no_grad():
                for parameter, piece in zip(self.parameters, pieces, strict=True):
                    parameter.add_(piece.view_as(parameter).to(parameter.dtype))
            return ask()
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, kept, strict=True):
                    parameter.copy_(old)

    def loss_at(self, displacement: Tensor) -> Tensor:
        """Return the loss at displaced weights."""
        return self.at(displacement, lambda: self.loss)

    def hvp(self, v: Tensor, step: float = 1e-5) -> Any:
        """Return the product of the Hessian and a vector of length about 1, by central differences."""
        ahead, behind = (self.at(sign * step * v, lambda: self.gradient) for sign in (1.0, -1.0))
        return (ahead - behind) / (2 * step)

    def hessian(self) -> Any:
        """Return the Hessian, symmetrised."""
        size = sum(parameter.numel() for parameter in self.parameters)
        rows = torch.stack([self.hvp(unit) for unit in torch.eye(size, dtype=torch.float64)])
        return (rows + rows.T) / 2

    def top(self, k: int = 1) -> Any:
        """Return the largest eigenvalues."""
        return torch.linalg.eigvalsh(self.hessian()).flip(0)[:k]


def probe(size: int) -> Any:
    """Return a vector of length 1, always the same."""
    v = torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return v / v.norm()


def numbers(objective: ma.Objective) -> Tensor:
    """Return the loss, the loss beside the gradient, the gradient, and a product with the Hessian, in one vector."""
    v = probe(objective.size).to(objective.point().dtype)
    beside, gradient = objective.loss_and_gradient()
    parts = [objective.loss(), beside, gradient, objective.hvp(v)]
    return torch.cat([part.detach().double().reshape(-1) for part in parts])


def right_numbers(truth: Truth) -> Tensor:
    """Return what :func:`numbers` must be."""
    gradient = truth.gradient
    loss = truth.loss.reshape(1)
    return torch.cat([loss, loss, gradient, truth.hvp(probe(len(gradient)))])


# --- small situations


def mlp(seed: int = 0, inputs: int = 3, classes: int = 2) -> Any:  # Any: cases reach into the layers
    """Return a perceptron in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, classes)).double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Return normal numbers in float64 from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int, classes: int = 2, seed: int = 2) -> Tensor:
    """Return class indices."""
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def points(n: int = 10, inputs: int = 3, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Return inputs and labels."""
    return normal(n, inputs), labels(n, classes)


def compiled(thing: Any, backend: str) -> Any:
    """Compile a function or module as the first thing that torch compiles here: what came before may change it."""
    torch.compiler.reset()
    return torch.compile(thing, backend=backend)


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Return what a function builds from a seed, in float64 and evaluation mode if it is a module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = build()
    return built.double().eval() if isinstance(built, nn.Module) else built
