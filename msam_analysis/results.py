"""Frozen results: what was measured, how well, at what cost and under which settings.

Every result knows how to become a :class:`pandas.DataFrame` (:meth:`Result.to_frame`) and how to be written
to and read from one ``.safetensors`` file (:meth:`Result.save`, :func:`load`): tensors as tensors, the rest
as JSON in the header. No pickle is involved, so a file from a stranger is safe to read.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Settings = Mapping[str, str | int | float | bool | None]

PARTIAL = ".partial-"
"""How the name of a folder begins that is being written."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached the tolerance it was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(abc.ABC):
    """Base of every result.

    Attributes
    ----------
    settings
        What the measurement was made on: BatchNorm policy, number of samples, parameters, data type, device.
    """

    settings: Settings = dataclasses.field(default_factory=dict)

    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the kind, so that :func:`load` finds it by name."""
        Result._kinds[cls.__name__] = cls

    @abc.abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Return the result as a tidy table; each kind says what its rows are."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one ``.safetensors`` file, atomically.

        Parameters
        ----------
        path
            Where to write; parents are made. An existing file is replaced only once the new one is complete.

        Returns
        -------
        pathlib.Path
            The file written.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                # A copy each: safetensors refuses tensors that share memory.
                tensors[field.name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            else:
                plain[field.name] = dict(value) if isinstance(value, Mapping) else value
        header = {"kind": type(self).__name__, "fields": json.dumps(plain)}
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata=header)
        return path


class atomic_path:  # noqa: N801 - used as a function in with statements
    """Give a temporary path beside ``path`` that replaces it on success and vanishes on failure.

    Parameters
    ----------
    path
        The final path; its parents are made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}.", suffix=self.path.suffix)
        os.close(handle)
        self.partial = Path(name)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # mkstemp makes files private; a result is as readable as any other file of the user's.
            umask = os.umask(0)
            os.umask(umask)
            self.partial.chmod(0o666 & ~umask)
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place, whole, on success and vanishes on failure.

    Parameters
    ----------
    path
        The final folder; its parents are made. What was in it before is gone afterwards.

    Yields
    ------
    pathlib.Path
        Where to write.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")
    old = partial.with_name(f"{partial.name}-old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.replace(old)
        partial.replace(path)
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


def load(path: str | os.PathLike[str]) -> Result:
    """Read a result that :meth:`Result.save` wrote.

    Parameters
    ----------
    path
        A ``.safetensors`` file.

    Returns
    -------
    Result
        Of the kind that was saved; tensors on the CPU.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is not a result of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}: expected a file written by Result.save()")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); pass one that Result.save() wrote") from None
    kind = Result._kinds.get(header.get("kind", ""))
    if kind is None:
        raise ValueError(
            f"{path} holds {header.get('kind', 'no kind of result')!r}, expected one of {sorted(Result._kinds)}"
        )
    try:
        return kind(**json.loads(header["fields"]), **tensors)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged: its header does not describe a {kind.__name__} ({type(error).__name__}: {error}); "
            "write it anew"
        ) from None


def _column(values: Tensor) -> Any:
    return values.detach().cpu().numpy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigenpairs(Result):
    """Eigenvalues of a symmetric operator, each certified by its residual.

    Attributes
    ----------
    values
        Shape ``(k,)``, in the order asked for (largest first by default), in the unit of the operator.
    vectors
        Shape ``(size, k)``, orthonormal columns.
    residuals
        Shape ``(k,)``: ``‖A v − λ v‖₂`` against the original operator. For a symmetric operator an exact eigenvalue
        lies within this distance of the value.
    converged
        Every residual is at most ``tolerance · |λ|``, or at the level of rounding, ``30 eps ‖A‖``.
    hvps
        Products with the operator that were spent, certificates included.
    method, which, tolerance
        What was asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    hvps: int
    method: str
    which: str
    tolerance: float

    def to_frame(self) -> pd.DataFrame:
        """Return one row per eigenvalue: ``index`` (from 1), ``value``, ``residual``, ``method``, ``converged``."""
        frame: pd.DataFrame = pd.DataFrame(
            {
                "index": range(1, len(self.values) + 1),
                "value": _column(self.values),
                "residual": _column(self.residuals),
                "method": self.method,
                "converged": self.converged,
            }
        )
        return frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """A Monte Carlo mean with its standard error.

    Attributes
    ----------
    quantity
        What is estimated.
    value, standard_error
        Mean over the draws and its standard error ``s / sqrt(draws)``.
    draws
        Independent draws used.
    evaluations
        Loss evaluations or Hessian-vector products spent.
    """

    quantity: str
    value: float
    standard_error: float
    draws: int
    evaluations: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row."""
        frame: pd.DataFrame = pd.DataFrame(
            [{key: getattr(self, key) for key in ("quantity", "value", "standard_error", "draws")}]
        )
        return frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class BallSharpness(Result):
    """The largest loss rise found in a ball around the weights, with the displacement that shows it.

    Attributes
    ----------
    sharpness
        ``L(w + displacement) − L(w)``, recomputed at the displacement returned; never negative, since 0 is in the ball.
        It is a lower bound of the true maximum.
    one_step
        ``L(w + ρ g/‖g‖) − L(w)``, what SAM's single ascent step finds (for other norms: its counterpart).
    loss
        ``L(w)``.
    displacement
        Shape ``(size,)``, inside the ball.
    rho, norm, adaptive
        The ball: ``‖e‖ ≤ ρ``, or ``‖e / |w|‖ ≤ ρ`` when adaptive.
    starts
        The rise reached from every start after the same few gradients; the ascent then goes on from the best.
    spread
        ``(best − worst) / best`` of these: how much the start matters.
    stationarity
        How far the displacement is from satisfying the first-order conditions of the constrained maximum; 0: it does.
        On the surface of the ball, the share of the (scaled) gradient ``q = D∇L`` that still points to a higher loss
        within it: for l2 the part tangent to the surface (and any inward part) over ``‖q‖``; for linf the entries not
        held at their bound over ``‖q‖``. Inside the ball, ``‖q‖ ρ / sharpness``: what the slope promises against what
        was found.
    converged
        The ascent from the best start stopped because it no longer rose, not because its budget ended.
    gradients, hvps
        Gradients and Hessian-vector products spent.
    """

    sharpness: float
    one_step: float
    loss: float
    displacement: Tensor
    rho: float
    norm: str
    adaptive: bool
    starts: Mapping[str, float]
    spread: float
    stationarity: float
    converged: bool
    gradients: int
    hvps: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row, without the displacement."""
        names = ("rho", "norm", "adaptive", "sharpness", "one_step", "loss", "spread", "stationarity", "converged")
        frame: pd.DataFrame = pd.DataFrame([{name: getattr(self, name) for name in names}])
        return frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice1D(Result):
    """Loss along a line: ``loss[i] = L(w + coordinates[i] · d)``.

    Attributes
    ----------
    coordinates
        Shape ``(points,)``, increasing; multiples of the direction, so ``coordinates · direction_norm`` are distances.
    loss
        Shape ``(points,)``. NaN and infinity are kept.
    center_loss
        ``L(w)``; equals ``loss`` at coordinate 0 exactly where 0 is on the grid.
    direction, direction_norm
        Its name (with the normalisation) and its L2 norm.
    """

    coordinates: Tensor
    loss: Tensor
    center_loss: float
    direction: str
    direction_norm: float

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``coordinate``, ``distance``, ``loss``."""
        coordinates = _column(self.coordinates)
        frame: pd.DataFrame = pd.DataFrame(
            {
                "coordinate": coordinates,
                "distance": coordinates * self.direction_norm,
                "loss": _column(self.loss),
            }
        )
        return frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice2D(Result):
    """Loss on a plane: ``loss[i, j] = L(w + x[i] · d1 + y[j] · d2)``.

    Attributes
    ----------
    x, y
        Shapes ``(nx,)`` and ``(ny,)``, increasing.
    loss
        Shape ``(nx, ny)``: the first index belongs to ``x`` and the first direction. NaN and infinity are kept.
    center_loss
        ``L(w)``; equals ``loss`` at (0, 0) exactly where that is on the grid.
    directions, direction_norms
        Names and L2 norms of the two directions, first x, then y.
    cosine
        Cosine between the two directions as applied.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    center_loss: float
    directions: tuple[str, str]
    direction_norms: tuple[float, float]
    cosine: float

    def __post_init__(self) -> None:
        """Turn lists from a file back into tuples."""
        object.__setattr__(self, "directions", tuple(self.directions))
        object.__setattr__(self, "direction_norms", tuple(self.direction_norms))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point: ``x``, ``y``, ``loss``; ``x`` varies slowest."""
        x, y = torch.meshgrid(self.x, self.y, indexing="ij")
        frame: pd.DataFrame = pd.DataFrame(
            {"x": _column(x.flatten()), "y": _column(y.flatten()), "loss": _column(self.loss.flatten())}
        )
        return frame


__all__ = [
    "BallSharpness",
    "ConvergenceWarning",
    "Eigenpairs",
    "Estimate",
    "Result",
    "Settings",
    "Slice1D",
    "Slice2D",
    "atomic_folder",
    "atomic_path",
    "load",
]
