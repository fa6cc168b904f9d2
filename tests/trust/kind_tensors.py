"""Kinds of tensors: complex, sparse, lazy, empty, quantised, half, shared."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, NotTried, Truth, case, labels, mlp, need, normal, numbers, points, right_numbers, seeded


def plainly(ask: Ask, net: nn.Module, x: Any, y: Any, f: Any = F.cross_entropy, tolerance: float = 1e-5) -> Answer:
    """Ask for loss, gradient and product of a network that autograd can differentiate as it is."""
    want = right_numbers(Truth(lambda: f(net(x), y), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, f, (x, y)))), want, tolerance


class Spectral(nn.Module):
    """A spectral layer with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, dtype=torch.cdouble))
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=4))


def _spectral() -> tuple[Spectral, Tensor, Tensor]:
    torch.manual_seed(0)
    return Spectral(), normal(8, 4), labels(8)


@case("tensors", "right", "refused")
def complex_parameters(ask: Ask) -> Answer:
    """Complex parameters: both parts count."""
    net, x, y = _spectral()
    size = ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).size)
    return size, 16, 0.0


@case("tensors", "right", "refused")
def complex_parameters_trace(ask: Ask) -> Answer:
    """Complex parameters: the squared gradient has both parts."""
    net, x, y = _spectral()
    F.cross_entropy(net(x), y).backward()
    want = sum(float(p.grad.abs().pow(2).sum()) for p in net.parameters() if p.grad is not None)
    net.zero_grad()
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).gradient().pow(2).sum()), want, 1e-6


class Fourier(nn.Module):
    """Real parameters, and a complex buffer."""

    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3).double()), nn.Linear(4, 2).double()
        self.register_buffer("phases", torch.randn(3, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.w * self.phases, n=4))


@case("tensors", "right", "refused")
def complex_buffers(ask: Ask) -> Answer:
    """Real parameters with a complex buffer."""
    torch.manual_seed(0)
    return plainly(ask, Fourier(), normal(8, 4), labels(8))


@case("tensors", "right", "refused")
def complex_inputs(ask: Ask) -> Answer:
    """Complex inputs of a network with real parameters."""

    class Modulus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            return self.net(x.abs())

    return plainly(ask, Modulus(), torch.complex(normal(8, 3), normal(8, 3, seed=3)), labels(8))


def _embedding(sparse: bool) -> Any:
    return seeded(lambda: nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2)))


@case("tensors", "right", "refused", "warned")
def sparse_gradients(ask: Ask) -> Answer:
    """Embedding(sparse=True), whose gradients are sparse."""
    x, y = torch.randint(5, (9, 2), generator=torch.Generator().manual_seed(0)), labels(9)
    dense = _embedding(sparse=False)
    want = right_numbers(Truth(lambda: F.cross_entropy(dense(x), y), dense.parameters()))
    net = _embedding(sparse=True)
    return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


@case("tensors", "right", "refused", "warned")
def sparse_gradients_eigenvalue(ask: Ask) -> Answer:
    """Embedding(sparse=True): the largest eigenvalue."""
    x, y = torch.randint(5, (9, 2), generator=torch.Generator().manual_seed(0)), labels(9)
    dense = _embedding(sparse=False)
    want = Truth(lambda: F.cross_entropy(dense(x), y), dense.parameters()).top(1)
    net = _embedding(sparse=True)
    got = ask(lambda: ma.top_eigenvalues(ma.Objective(net, F.cross_entropy, (x, y)), k=1).values)
    need(torch.allclose(got, want, rtol=1e-4), f"{got}, dense {want}")
    return got, want, 1e-4


class SparseLinear(nn.Module):
    """A linear layer for sparse rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Any:
        return torch.sparse.mm(x, self.w)


def sparse_rows() -> Tensor:
    x = normal(8, 6)
    return torch.where(x > 0.5, x, 0.0)


@case("tensors", "right", "refused")
def sparse_inputs(ask: Ask) -> Answer:
    """Sparse inputs (COO)."""
    return plainly(ask, seeded(SparseLinear), sparse_rows().to_sparse_coo(), labels(8))


@case("tensors", "right", "refused")
def sparse_row_inputs(ask: Ask) -> Answer:
    """Sparse inputs (CSR)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = sparse_rows().to_sparse_csr()
    return plainly(ask, seeded(SparseLinear), x, labels(8))


@case("tensors", "right", "refused")
def sparse_adjacency(ask: Ask) -> Answer:
    """A sparse adjacency matrix beside node features, in a dictionary."""
    net, (x, y) = mlp(), points()
    batch = {"x": x, "adjacency": torch.eye(10, dtype=torch.float64).roll(1, 0).to_sparse_coo(), "y": y}

    def f(model: Any, b: Any) -> Any:
        return F.cross_entropy(torch.sparse.mm(b["adjacency"], model(b["x"])), b["y"])

    want = right_numbers(Truth(lambda: f(net, batch), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, f, batch))), want, 1e-5


@case("tensors", "refused")
def lazy_layers(ask: Ask) -> Answer:
    """A lazy layer that has not seen data."""
    net, (x, y) = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)).double(), points()
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x, y)).loss()), 0.0, 0.0


@case("tensors", "right")
def lazy_layers_initialised(ask: Ask) -> Answer:
    """A lazy layer that has seen data."""
    x, y = points()
    net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)).double()
    net(x)
    return plainly(ask, net, x, y)


class Meta(nn.Module):
    """A layer that was never given memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2, device="meta")

    def forward(self, x: Tensor) -> Any:
        return self.a(x)


@case("tensors", "refused")
def meta_parameters(ask: Ask) -> Answer:
    """Parameters on the meta device, which have no values."""
    net, (x, y) = Meta(), points()
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x.float(), y)).loss()), 0.0, 0.0


class Odd(nn.Module):
    """A network with one more parameter."""

    def __init__(self, extra: Tensor) -> None:
        super().__init__()
        self.extra, self.net = nn.Parameter(extra), mlp()

    def forward(self, x: Tensor) -> Any:
        return self.net(x) * (1 + self.extra.sum())


@case("tensors", "right")
def empty_parameters(ask: Ask) -> Answer:
    """A parameter without entries."""
    return plainly(ask, Odd(torch.empty(0, 3).double()), *points())


@case("tensors", "right")
def scalar_parameters(ask: Ask) -> Answer:
    """A parameter without dimensions."""
    return plainly(ask, Odd(torch.tensor(0.3).double()), *points())


@case("tensors", "right")
def transposed_parameters(ask: Ask) -> Answer:
    """A parameter that is not contiguous."""
    net = mlp()
    net[0].weight = nn.Parameter(normal(3, 4).T)
    return plainly(ask, net, *points())


@case("tensors", "right", "refused")
def expanded_parameters(ask: Ask) -> Answer:
    """A parameter whose entries share memory (expand)."""
    net, (x, y) = mlp(), points()
    plain = mlp()
    plain[0].weight = nn.Parameter(normal(4, 1).expand(4, 3).clone())
    net[0].weight = nn.Parameter(normal(4, 1).expand(4, 3))
    want = right_numbers(Truth(lambda: F.cross_entropy(plain(x), y), plain.parameters()))
    return ask(lambda: numbers(ma.Objective(net, F.cross_entropy, (x, y)))), want, 1e-5


@case("tensors", "right", "refused")
def parameters_in_one_buffer(ask: Ask) -> Answer:
    """Parameters that are views of one flat tensor."""
    net = mlp()
    flat = normal(26, seed=5)
    for parameter, piece in zip(net.parameters(), flat.split([p.numel() for p in net.parameters()]), strict=True):
        parameter.data = piece.view_as(parameter)
    return plainly(ask, net, *points())


@case("tensors", "right")
def tied_parameters(ask: Ask) -> Answer:
    """Tied weights count once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.tanh(self.a(x)))

    return plainly(ask, seeded(Tied), torch.arange(5), torch.arange(5).roll(1))


class Mixed(nn.Module):
    """Integer weights with a scale, which are not trained (weight-only quantisation), and a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randint(-9, 9, (4, 3), dtype=torch.int8), requires_grad=False)
        self.net = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.net(torch.tanh(F.linear(x, self.q.to(x.dtype) / 9)))


@case("tensors", "right")
def integer_weights(ask: Ask) -> Answer:
    """Frozen integer weights below a trained layer."""
    return plainly(ask, seeded(Mixed), *points())


@case("tensors", "right", "refused")
def quantised_model(ask: Ask) -> Answer:
    """A dynamically quantised network: nothing is left to differentiate."""
    net, (x, y) = mlp().float(), points()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
            quantised(x.float())
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        raise NotTried(str(error)) from error
    return ask(lambda: ma.Objective(quantised, F.cross_entropy, (x.float(), y)).loss()), 0.0, 0.0


@case("tensors", "right", "refused")
def byte_inputs(ask: Ask) -> Answer:
    """Images as bytes, scaled in forward."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            return self.net(x.double() / 255)

    x = torch.randint(256, (8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return plainly(ask, Scaled(), x, labels(8))


@case("tensors", "right", "refused")
def nested_inputs(ask: Ask) -> Answer:
    """A list of sequences of different length, made nested in the loss."""
    net = mlp()
    batch = {"x": normal(3, 4, 3), "lengths": torch.tensor([4, 2, 3]), "y": labels(3)}

    def f(model: Any, b: Any) -> Any:
        rows = [model(x[:n]).mean(0) for x, n in zip(b["x"], b["lengths"].tolist(), strict=True)]
        return F.cross_entropy(torch.stack(rows), b["y"])

    want = right_numbers(Truth(lambda: f(net, batch), net.parameters()))
    return ask(lambda: numbers(ma.Objective(net, f, batch))), want, 1e-5


@case("tensors", "right")
def mixed_precision_parameters(ask: Ask) -> Answer:
    """Parameters in float32 and float64 side by side."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.tanh(self.a(x)).double())

    torch.manual_seed(0)
    net, (x, y) = Both(), points()
    truth = Truth(lambda: F.cross_entropy(net(x.float()), y), net.parameters())
    want = torch.cat([truth.loss.reshape(1), truth.gradient])

    def question() -> Tensor:
        objective = ma.Objective(net, F.cross_entropy, (x.float(), y))
        return torch.cat([objective.loss().reshape(1), objective.gradient()])

    return ask(question), want, 1e-6


def _half(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    net, (x, y) = mlp().to(dtype), points()
    exact = mlp()
    exact.load_state_dict(net.state_dict())
    return net, exact, x.to(dtype), y


@case("tensors", "right")
def bfloat16_model_measured_in_float32(ask: Ask) -> Answer:
    """A bfloat16 network measured with dtype=torch.float32: its largest eigenvalue."""
    net, exact, x, y = _half(torch.bfloat16)
    want = Truth(lambda: F.cross_entropy(exact(x.double()), y), exact.parameters()).top(1)
    objective = ask(lambda: ma.Objective(net, F.cross_entropy, (x, y), dtype=torch.float32))
    return ask(lambda: ma.top_eigenvalues(objective, k=1).values), want, 1e-3


@case("tensors", "right", "refused", "warned")
def bfloat16_model(ask: Ask) -> Answer:
    """A bfloat16 network as it is: its largest eigenvalue to the few digits that it has, or a warning."""
    net, exact, x, y = _half(torch.bfloat16)
    want = Truth(lambda: F.cross_entropy(exact(x.double()), y), exact.parameters()).top(1)
    return ask(lambda: ma.top_eigenvalues(ma.Objective(net, F.cross_entropy, (x, y)), k=1).values), want, 0.03


@case("tensors", "right", "refused", "warned")
def float16_model(ask: Ask) -> Answer:
    """A float16 network as it is: its trace to the few digits that it has, or a warning."""
    net, exact, x, y = _half(torch.float16)
    truth = Truth(lambda: F.cross_entropy(exact(x.double()), y), exact.parameters())
    want = truth.hessian().trace()
    got = ask(lambda: ma.trace(ma.Objective(net, F.cross_entropy, (x, y)), draws=200))
    need(abs(got.value - float(want)) < 4 * got.standard_error + 0.03 * float(want) or ask.said, f"{got.value}, {want}")
    return None
