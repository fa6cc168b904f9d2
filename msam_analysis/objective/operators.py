"""Symmetric linear operators: all that an eigensolver needs to see.

A solver calls :meth:`SymmetricOperator.matvec`; where the numbers come from (a Hessian, a Gauss-Newton matrix, a
matrix on paper) is not its business.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from msam_analysis.objective.memory import VECTOR_BYTES
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import no_autocast
from msam_analysis.results import Settings

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SymmetricOperator(abc.ABC):
    """A symmetric linear map ``A`` from flat vectors of length ``size`` to themselves.

    Attributes
    ----------
    size
        Number of rows and columns.
    space
        Where vectors lie. By default every process has whole ones, ``space.here`` is ``size``.
    dtype, device
        Data type and device of the vectors that it takes and returns.
    products
        Matrix-vector products made so far.
    memory_bytes
        Bytes of vectors that a solver may hold by default.
    settings
        What the operator was built on; copied into every result.
    """

    def __init__(
        self,
        size: int | Space,
        *,
        dtype: torch.dtype,
        device: torch.device,
        settings: Settings | None = None,
    ) -> None:
        self.space = size if isinstance(size, Space) else Space(size)
        self.size = self.space.size
        self.dtype = dtype
        self.device = device
        self.products = 0
        self.memory_bytes = VECTOR_BYTES
        self.settings = dict(settings or {})

    @abc.abstractmethod
    def _apply(self, vector: Tensor) -> Tensor:
        """Return ``A v`` for one checked vector."""

    def _apply_columns(self, matrix: Tensor) -> Tensor:
        """Return ``A V`` for the columns of a checked matrix, of which there is at least one."""
        return torch.stack([self._apply(column) for column in matrix.unbind(1)], dim=1)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return ``A v``.

        Parameters
        ----------
        vector
            Shape ``(size,)``; taken to the operator's data type and device.

        Returns
        -------
        Tensor
            Shape ``(size,)``.

        Raises
        ------
        ValueError
            The vector has another shape.
        """
        here = self.space.here
        if vector.shape != (here,):
            raise ValueError(f"expected a vector of shape ({here},), got {tuple(vector.shape)}: flatten it first")
        self.products += 1
        return self._apply(vector.to(dtype=self.dtype, device=self.device))

    def matmat(self, matrix: Tensor) -> Tensor:
        """Return ``A V`` for the columns of a ``(size, p)`` matrix, which counts as p products; else as :meth:`matvec`.

        Never slower than one product after another, and faster where they can share what is costly.
        """
        if matrix.ndim != 2 or matrix.shape[0] != self.space.here:
            raise ValueError(
                f"expected a matrix of shape ({self.space.here}, p), got {tuple(matrix.shape)}: vectors are columns"
            )
        self.products += matrix.shape[1]
        matrix = matrix.to(dtype=self.dtype, device=self.device)
        return self._apply_columns(matrix) if matrix.shape[1] else matrix

    def __matmul__(self, other: Tensor) -> Tensor:
        """``A @ v`` or ``A @ V``; see :meth:`matvec` and :meth:`matmat`."""
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def to_scipy(self) -> LinearOperator:
        """Return a :class:`scipy.sparse.linalg.LinearOperator` in float64 that calls this one.

        Its ``matvec``, ``matmat``, their adjoints and ``@`` take and return NumPy arrays; what SciPy does in blocks,
        such as ``scipy.sparse.linalg.lobpcg``, goes through :meth:`matmat`.
        """
        from scipy.sparse.linalg import LinearOperator

        def apply(array: np.ndarray) -> np.ndarray:
            # SciPy hands over (n,), (n, 1) or (n, p) and wants the same shape back.
            columns = torch.tensor(np.asarray(array), dtype=torch.float64).reshape(self.size, -1)
            return self.matmat(columns).cpu().double().numpy().reshape(array.shape)

        return LinearOperator(
            (self.size, self.size), matvec=apply, rmatvec=apply, matmat=apply, rmatmat=apply, dtype=np.float64
        )


class MatrixOperator(SymmetricOperator):
    """An explicit symmetric matrix.

    Parameters
    ----------
    matrix
        Shape ``(n, n)``, floating point.

    Raises
    ------
    ValueError
        The matrix is not square or not symmetric to 1e-5 of its largest entry.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(matrix.shape)}: pass (n, n)")
        largest = matrix.abs().max() if matrix.numel() else matrix.new_zeros(())
        if bool((matrix - matrix.T).abs().max() > 1e-5 * largest) if matrix.numel() else False:
            raise ValueError("expected a symmetric matrix, got one that differs from its transpose: pass (A + A.T) / 2")
        super().__init__(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix

    def _apply(self, vector: Tensor) -> Tensor:
        return self._apply_columns(vector[:, None])[:, 0]

    def _apply_columns(self, matrix: Tensor) -> Tensor:
        with no_autocast(self.device):
            return self.matrix @ matrix


class ScaledOperator(SymmetricOperator):
    """``D A D`` for a diagonal ``D`` of shape ``(size,)``: the Hessian in coordinates ``e = D z``."""

    def __init__(self, operator: SymmetricOperator, diagonal: Tensor) -> None:
        super().__init__(operator.space, dtype=operator.dtype, device=operator.device)
        self.settings = operator.settings  # the same, which it may complete at its first product
        self.operator = operator
        self.memory_bytes = operator.memory_bytes
        self.diagonal = diagonal

    def _apply(self, vector: Tensor) -> Tensor:
        return self.diagonal * self.operator.matvec(self.diagonal * vector)

    def _apply_columns(self, matrix: Tensor) -> Tensor:
        return self.diagonal[:, None] * self.operator.matmat(self.diagonal[:, None] * matrix)
