"""The working directory of a user of the command line, and calls of the command in this process."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis import cli
from msam_analysis.checkpoints.loading import load_model

MODULE = "workbench"
SOURCE = '''
"""Factories as a user writes them."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

generator = torch.Generator().manual_seed(0)
x = torch.randn(30, 4, generator=generator)
y = torch.randint(3, (30,), generator=generator)
a_number = 5


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def other_model():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def no_model():
    return 3


def frozen_model():
    return model().requires_grad_(False)


def failing_model():
    raise RuntimeError("the model is unwell\\nand says so in two lines")


def needs_arguments(width, depth):
    return model()


def leaves():
    raise SystemExit(0)


def loaded(path):
    found = model()
    found.load_state_dict(torch.load(path, weights_only=True))
    return found


def data():
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def loader():
    return DataLoader(TensorDataset(x, y), batch_size=20)


def shuffling_loader():
    return DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)


def empty_loader():
    return DataLoader(TensorDataset(x[:0], y[:0]), batch_size=20)


def no_batches():
    return []


def data_set():
    return TensorDataset(x, y)


def failing_data():
    raise RuntimeError("the disk is on fire\\nand so is the other one")


def missing_data():
    return open("no such file")


def incomplete_data():
    return {"a": 1}["b"]


def misshapen_data():
    return [(x[:, :3], y)]


def data_and_squares():
    return data(), squares()


def squares():
    return lambda output, target: (output - F.one_hot(target, 3)).square().mean()


def not_a_scalar():
    return nn.CrossEntropyLoss(reduction="none")


def detached():
    return lambda output, target: output.detach().square().mean()


def failing_loss():
    def loss(output, target):
        raise ArithmeticError("the loss is lost")

    return loss


class Nested:
    data = staticmethod(data)
'''


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def call(
    arguments: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
    patch: pytest.MonkeyPatch,
    module: str = MODULE,
) -> Outcome:
    """Call the command with arguments, as the installed script does; the bench's module is forgotten afterwards."""
    patch.setattr(sys, "argv", ["msam-analysis", *map(str, arguments)])
    capsys.readouterr()
    try:
        code: object = cli.main()  # type: ignore[func-returns-value]  # None, as a script that ended well
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.modules.pop(module, None)
    captured = capsys.readouterr()
    return Outcome(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)


def furnish(folder: Path) -> None:
    """Write what is in the working directory of a user: modules with factories, and checkpoints."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    (folder / "broken.py").write_text("def model(:\n")
    (folder / "raising.py").write_text("raise RuntimeError('this module cannot be imported')\n")
    (folder / "leaving.py").write_text("raise SystemExit(3)\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        model(torch.randn(50, 4))
    (folder / "run").mkdir()
    (folder / "empty").mkdir()
    (folder / "code.pt").write_bytes(pickle.dumps({"a": print}))
    torch.save(model.state_dict(), folder / "run" / "checkpoint.pt")
    (folder / "damaged.pt").write_bytes((folder / "run" / "checkpoint.pt").read_bytes()[:700])
    (folder / "notes.pt").write_text("not weights")
    torch.save(model, folder / "whole.pt")
    torch.save({name: tensor * math.nan for name, tensor in model.state_dict().items()}, folder / "nan.pt")


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


CHECKPOINT = "run/checkpoint.pt"
GOOD = ("measure", CHECKPOINT, "--model", f"{MODULE}:model", "--data", f"{MODULE}:data", "--out", "out")


def with_option(name: str, value: str) -> list[str]:
    """Return the good command with one option replaced, or added."""
    arguments = list(GOOD)
    if name in arguments:
        arguments[arguments.index(name) + 1] = value
        return arguments
    return [*arguments, name, value]


def objective(loss_fn: Callable[..., torch.Tensor] | None = None, **options: str) -> ma.Objective:
    """Build what the good command measures, from the same module, by the library's calls."""
    namespace: dict[str, object] = {}
    exec(compile(SOURCE, MODULE, "exec"), namespace)  # noqa: S102 - the text above
    factory, data = namespace["model"], namespace["data"]
    assert callable(factory)
    assert callable(data)
    return ma.Objective(load_model(CHECKPOINT, factory), loss_fn or nn.CrossEntropyLoss(), data(), **options)  # type: ignore[arg-type]


def check_numbers(table: pd.DataFrame, out: str) -> None:
    """Every metric is printed, in a line of its own, with its value; so is what the examination found."""
    examined = table["metric"] == "examination"
    assert all(words in " ".join(out.split()) for words in table[examined]["meaning"])
    for row in table[~examined].to_dict("records"):
        lines = [line for line in out.splitlines() if re.search(rf"(?<!\S){re.escape(row['metric'])}(?!\S)", line)]
        values = [float(n) for line in lines for n in re.findall(r"(?<![\w.=])-?\d+\.?\d*(?:e[-+]\d+)?(?![\w.])", line)]
        assert any(math.isclose(value, row["value"], rel_tol=1e-3) for value in values), (row, lines)
