"""Examinations that are handed on: what was found about one objective holds for the next of its kind."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.objective.evaluation import Evaluation, Findings
from msam_analysis.objective.examine import examine, looked_at
from msam_analysis.objective.means import is_mean
from msam_analysis.objective.nested import fields_of, is_record
from msam_analysis.objective.randomness import ALONE
from msam_analysis.objective.second_derivatives import SecondDerivatives

Found = tuple[Findings, SecondDerivatives]


class Examinations:
    """Findings about models that live, which neither keep a model nor its data alive."""

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Found]] = weakref.WeakKeyDictionary()

    @contextmanager
    def handed_on(self) -> Iterator[None]:
        """Inside, objectives of one model, loss function and kind of data are examined once."""
        token = _HANDED_ON.set(self)
        try:
            yield
        finally:
            _HANDED_ON.reset(token)

    def of(self, evaluation: Evaluation) -> dict[Hashable, Found]:
        """Return the findings about a model, by kind."""
        return self._found.setdefault(evaluation.original.model, {})


_HANDED_ON: ContextVar[Examinations | None] = ContextVar("handed_on", default=None)


def made_ready(evaluation: Evaluation, *, examines: bool) -> Evaluation:
    """Return an evaluation that follows its model, and is examined if it is to be; threads pass one by one."""
    with ALONE:
        evaluation.follow()
        if examines and evaluation.findings.examination is None:
            examine_once(evaluation)
        evaluation.find_randomness()
    return evaluation


def examine_once(evaluation: Evaluation) -> None:
    """Examine an evaluation, or take over what was found about another one of its kind."""
    examinations = _HANDED_ON.get()
    if examinations is None:
        examine(evaluation)
        return
    found, kind = examinations.of(evaluation), _kind(evaluation)
    if kind not in found:
        examine(evaluation)
        found[kind] = evaluation.findings, evaluation.second_derivatives
        return
    findings, evaluation.second_derivatives = found[kind]
    evaluation.findings = replace(findings)
    evaluation.follow()
    if len(evaluation.batches) > 1:  # what they weigh depends on what they hold
        _weigh_anew(evaluation)


def _weigh_anew(evaluation: Evaluation) -> None:
    findings, before = evaluation.findings, evaluation.findings.examination
    findings.weighing = Findings().weighing
    mean = is_mean(evaluation, looked_at(evaluation))
    evaluation._weights = None
    if before is not None:
        findings.examination = replace(before, checks=tuple(mean if c.topic == "mean" else c for c in before.checks))


def _kind(evaluation: Evaluation) -> Hashable:
    """Return what an examination depends on, beside the model: the loss function, the options, the kind of data."""
    options = (evaluation.cast, evaluation.batchnorm, evaluation.autocast, evaluation.dropout, evaluation.seed)
    chosen = (*options, evaluation.device, evaluation.layout, evaluation.second_derivatives.wish)
    return _mark(evaluation.original.loss_fn), chosen, _form(evaluation.batches.first())


def _form(batch: Any) -> Hashable:
    """Return the structure of a batch: containers, keys, and data types and dimensions of tensors."""
    if isinstance(batch, Tensor):
        return batch.dtype, batch.ndim
    if isinstance(batch, Mapping):
        return type(batch), *((key, _form(item)) for key, item in batch.items())
    if isinstance(batch, list | tuple):
        return type(batch), *map(_form, batch)
    return type(batch), is_record(batch) and _form(fields_of(batch))


def _mark(item: Any) -> Hashable:
    """Return what tells a function or a criterion from another: its code and settings, the identity of all else."""
    if isinstance(item, MethodType):
        return _mark(item.__func__), _mark(item.__self__)
    if isinstance(item, functools.partial):
        return _mark(item.func), _mark(item.args), _mark(item.keywords)
    if isinstance(item, FunctionType):
        enclosed = [cell.cell_contents for cell in item.__closure__ or ()]
        return item.__code__, _mark(item.__defaults__), _mark(item.__kwdefaults__), _mark(enclosed)
    if isinstance(item, nn.Module) and not any(True for _ in item.parameters()):
        return type(item), _mark(vars(item))
    if isinstance(item, Mapping):
        return tuple((key, _mark(value)) for key, value in item.items())
    if isinstance(item, list | tuple | set):
        return tuple(map(_mark, item))
    plain = item is None or isinstance(item, bool | int | float | str | type | torch.dtype | torch.device)
    return (type(item), item) if plain else _Same(item)


class _Same:
    """The identity of a thing for as long as it lives."""

    def __init__(self, item: Any) -> None:
        self._number = id(item)
        try:
            self._item: Any = weakref.ref(item)
        except TypeError:  # nobody can tell whether it lives
            self._item = lambda: None

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        item = self._item()
        return item is not None and isinstance(other, _Same) and item is other._item()
