"""Weights that FSDP2 divides by rows among processes: which rows lie where, and how whole weights are made of them.

A private copy of such a model holds the shards of one point. The weights of an FSDP unit are gathered before its
forward pass and let go after it. What autograd keeps of them is kept as shards, and gathered again when it is needed;
so no process holds more whole weights than those of the units that run.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msam.shards import like
from msam_analysis.objective.private import LossModule, is_unit
from msam_analysis.objective.space import DividedSpace

if TYPE_CHECKING:  # which holds shards
    from msam_analysis.objective.evaluation import Evaluation

# New versions of torch have other names for them, and warn of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Rows:
    """How the rows of one tensor are divided among processes: as by :func:`torch.chunk`, so that some may have none."""

    shape: torch.Size  # of the whole tensor; a 0-dimensional one is one row
    chunk: int  # rows of every process but the last ones
    here: slice  # the rows of this process

    @property
    def width(self) -> int:
        """Number of entries of a row."""
        return math.prod(self.shape[1:])

    @property
    def part(self) -> torch.Size:
        """Shape of this process's part."""
        return torch.Size((self.here.stop - self.here.start, *self.shape[1:]))

    def of(self, whole: Tensor) -> Tensor:
        """Return this process's part of a whole tensor."""
        return (whole if self.shape else whole.reshape(1))[self.here]


@dataclass(frozen=True)
class Mesh:
    """The processes among which weights are divided."""

    group: Any
    rank: int
    count: int
    copies: tuple[Any, ...]  # groups of processes that have the same parts
    size: int  # of all these groups together

    def most(self, number: int, device: torch.device) -> int:
        """Return the largest of the numbers that the processes have."""
        largest = torch.tensor(number, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def over_copies(self, vector: Tensor) -> Tensor:
        """Return the sum of a vector over the processes that have the same parts, in place."""
        for group in self.copies:
            dist.all_reduce(vector, group=group)
        return vector

    def rows(self, shape: torch.Size) -> Rows:
        """Return how a tensor is divided."""
        rows = shape[0] if shape else 1
        chunk = -(-rows // self.count)
        start, stop = (min(rank * chunk, rows) for rank in (self.rank, self.rank + 1))
        return Rows(shape, chunk, slice(start, stop))


class Division(NamedTuple):
    """Some tensors of one data type that are gathered together."""

    mesh: Mesh
    rows: tuple[Rows, ...]
    alike: bool  # whether all processes do the same with the whole tensors

    def whole(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return whole tensors from the parts of all processes."""
        sizes = [rows.chunk * rows.width for rows in self.rows]
        own = parts[0].new_zeros(sum(sizes))  # parts are filled up, since collectives want them to be alike
        for part, place in zip(parts, own.split(sizes), strict=True):
            place[: part.numel()].copy_(part.reshape(-1))
        every = own.new_empty(self.mesh.count * len(own))
        _all_gather(every, own, group=self.mesh.group)
        columns = every.view(self.mesh.count, -1).split(sizes, dim=1)
        return [
            column.reshape(-1)[: math.prod(rows.shape)].view(rows.shape)
            for column, rows in zip(columns, self.rows, strict=True)
        ]

    def parts(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's parts of whole tensors: of those that all have, or of the sums of all processes'."""
        if self.alike:
            return [rows.of(whole).clone() for whole, rows in zip(wholes, self.rows, strict=True)]
        sizes = [rows.chunk * rows.width for rows in self.rows]
        every = wholes[0].new_zeros(self.mesh.count, sum(sizes))
        for whole, place, rows in zip(wholes, every.split(sizes, dim=1), self.rows, strict=True):
            for other, part in enumerate((whole if rows.shape else whole.reshape(1)).split(max(rows.chunk, 1))):
                place[other, : part.numel()].copy_(part.reshape(-1))
        own = every.new_empty(sum(sizes))
        _reduce_scatter(own, every.view(-1), group=self.mesh.group)
        return [
            part[: math.prod(rows.part)].view(rows.part) for part, rows in zip(own.split(sizes), self.rows, strict=True)
        ]


class _Whole(torch.autograd.Function):
    """Parts to whole tensors: the derivative in a part is that part of the derivative, summed over its users."""

    @staticmethod
    def forward(ctx: Any, division: Division, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.division = division
        return tuple(division.whole(parts))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_part(ctx.division, *slopes)


class _Part(torch.autograd.Function):
    """Whole tensors to parts; the way back of :class:`_Whole`, which is the way back of this."""

    @staticmethod
    def forward(ctx: Any, division: Division, *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.division = division
        return tuple(division.parts(wholes))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_whole(ctx.division, *slopes)


_whole: Any = _Whole.apply
_part: Any = _Part.apply


class _Gathered(NamedTuple):
    """The shards behind whole tensors."""

    division: Division
    parts: tuple[Tensor, ...]


class _Packed(NamedTuple):
    """A view of a whole tensor, without the whole tensor."""

    gathered: _Gathered
    number: int
    view: tuple[Any, ...]


class Gatherer:
    """Makes whole weights of shards, and knows them again when autograd keeps them."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._known: dict[int, tuple[weakref.ref[Any], _Gathered, int]] = {}
        self._last: tuple[_Gathered, list[Tensor]] | None = None

    def whole(self, rows: Sequence[Rows], parts: Sequence[Tensor], *, alike: bool = True) -> list[Tensor]:
        """Return whole tensors, as differentiable functions of the parts; ``alike``: for the same use everywhere."""
        self.release()
        kinds: dict[tuple[bool, torch.dtype], list[int]] = defaultdict(list)
        for index, part in enumerate(parts):
            kinds[part.requires_grad and torch.is_grad_enabled(), part.dtype].append(index)
        found: dict[int, Tensor] = {}
        for (varying, _), chosen in kinds.items():
            division = Division(self._mesh, tuple(rows[index] for index in chosen), alike)
            own = tuple(parts[index] for index in chosen)
            wholes = _whole(division, *own) if varying else division.whole(own)
            self._remember(_Gathered(division, tuple(part.detach() for part in own)), wholes)
            found.update(zip(chosen, wholes, strict=True))
        return [found[index] for index in range(len(parts))]

    def _remember(self, gathered: _Gathered, wholes: Iterable[Tensor]) -> None:
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        for index, whole in enumerate(wholes):
            storage = whole.untyped_storage()
            self._known[storage.data_ptr()] = weakref.ref(storage), gathered, index

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        """Return what autograd keeps: of a whole weight its shards, else the tensor."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage.data_ptr())
        if known is None or known[0]() is not storage:
            return tensor.detach()  # the tensor itself would keep its graph alive
        return _Packed(known[1], known[2], (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def unpack(self, kept: Tensor | _Packed) -> Tensor:
        """Return the tensor that was packed; the weights of the last unit stay until others are needed."""
        if isinstance(kept, Tensor):
            return kept
        if self._last is None or self._last[0] is not kept.gathered:
            self.release()
            with torch.no_grad():
                wholes = kept.gathered.division.whole(kept.gathered.parts)
            self._last = kept.gathered, wholes
            self._remember(kept.gathered, wholes)
        return self._last[1][kept.number].as_strided(*kept.view)

    def release(self) -> None:
        """Let the weights go that the last backward pass needed."""
        self._last = None

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Inside, autograd keeps shards instead of whole weights."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self.release()


class _Weights(dict[str, Any]):
    """The parameters of a module of a private copy, where shards lie; who asks for one gets it whole."""

    def __init__(self, own: Mapping[str, Any], names: Mapping[str, str], units: Units) -> None:
        super().__init__(own)
        self._names, self._units = names, units

    def __getitem__(self, key: str) -> Any:
        name = self._names.get(key)
        return super().__getitem__(key) if name is None else self._units.whole(name, super().__getitem__(key))


class Units:
    """The FSDP units of a private copy: they gather their weights before their forward passes."""

    def __init__(self, copied: LossModule, shards: Shards) -> None:
        self._gatherer = shards.gatherer
        self._rows: dict[str, Rows] = {}
        self._parts: dict[str, Tensor] = {}
        self._present: dict[str, Tensor] = {}
        self._alike = True
        name_of = {id(tensor): name for name, tensor in copied.named_parameters()}
        for module in copied.modules():
            own = module._parameters
            names = {key: name_of[id(tensor)] for key, tensor in own.items() if tensor is not None}
            vars(module)["_parameters"] = _Weights(own, names, self)
        for unit, names_here in shards.units.items():
            module = copied.get_submodule(unit)
            module.register_forward_pre_hook(lambda *_, names=names_here: self._enter(names))
            module.register_forward_hook(lambda *_, names=names_here: self._leave(names), always_call=True)

    def place(self, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], *, alike: bool) -> None:
        """Take the tensors of a point, of which those with ``rows`` are shards; ``alike``: for the same batches."""
        self._present.clear()
        self._alike = alike
        for name, tensor in tensors.items():
            if name in rows:
                self._rows[name], self._parts[name] = rows[name], tensor
            else:
                self._rows.pop(name, None)

    def divide(self, parameters: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> None:
        """Take parameters of its own, and leave in them this process's parts."""
        for name, row in rows.items():
            if parameters[name].shape != row.part:
                parameters[name].data = row.of(parameters[name].detach()).clone()
        self.place(parameters, rows, alike=True)

    def whole(self, name: str, held: Tensor) -> Tensor:
        """Return a parameter whole; where its unit does not run, for this once."""
        if name not in self._rows:
            return held
        if name in self._present:
            return self._present[name]
        return self._gatherer.whole([self._rows[name]], [held], alike=self._alike)[0]

    def _enter(self, names: Sequence[str]) -> None:
        divided = [name for name in names if name in self._rows and name not in self._present]
        if divided:
            parts = [self._parts[name] for name in divided]
            wholes = self._gatherer.whole([self._rows[name] for name in divided], parts, alike=self._alike)
            self._present.update(zip(divided, wholes, strict=True))

    def _leave(self, names: Sequence[str]) -> None:
        for name in names:
            self._present.pop(name, None)


class Shards:
    """How the weights of a model are divided, and which are gathered together.

    Parameters
    ----------
    original
        A network and its criterion; their shards must be in place.

    Raises
    ------
    ValueError
        Weights are divided in another way than by rows among the processes of one group.
    """

    def __init__(self, original: LossModule) -> None:
        divided = {name: p for name, p in original.named_parameters() if hasattr(p, "to_local")}
        meshes = {name: _mesh_of(name, parameter) for name, parameter in divided.items()}
        first, self.mesh = next(iter(meshes.items()))
        self.gatherer = Gatherer(self.mesh)
        self.rows = {name: self.mesh.rows(parameter.shape) for name, parameter in divided.items()}
        for name, mesh in meshes.items():
            here = divided[name].to_local().shape
            if mesh != self.mesh or here != self.rows[name].part:
                raise ValueError(
                    f"expected weights that are all divided alike, got {name!r} with {tuple(here)} of "
                    f"{tuple(divided[name].shape)} here, unlike {first!r}: shard the whole model by fully_shard with "
                    "one mesh and without shard_placement_fn"
                )
        units = [name for name, module in original.named_modules() if is_unit(module)]
        self.units: dict[str, list[str]] = {"": [], **{unit: [] for unit in units}}
        for name, _ in original.named_parameters():
            above = [unit for unit in self.units if not unit or name.startswith(f"{unit}.")]
            unit = max(above, key=len)
            if name in divided and not unit:
                raise ValueError(
                    f"the parameter {name!r} is divided among processes, but not by fully_shard: expected FSDP2; "
                    "measure a model whose weights are whole, or sharded by fully_shard"
                )
            self.units[unit].append(name)

    def check(self, processes: int) -> None:
        """Raise ``ValueError`` unless as many processes measure together as hold the weights."""
        if processes != self.mesh.size:
            raise ValueError(
                f"the weights are sharded over {self.mesh.size} processes, and {processes} measure together: expected "
                "the same ones, since nobody has them whole; say ranks=True if all have the same data, or "
                "ranks='split' if each has other data"
            )

    def space(self, rows: Sequence[Rows]) -> DividedSpace:
        """Return the space of flat vectors of such tensors."""
        pieces, start = [], 0
        for row in rows:
            pieces.append(slice(start + row.here.start * row.width, start + row.here.stop * row.width))
            start += math.prod(row.shape)
        return DividedSpace(start, pieces, sum(row.chunk * row.width for row in rows), self.mesh.group)


def _mesh_of(name: str, parameter: Any) -> Mesh:
    """Return the processes among which the rows of a parameter are divided; ``ValueError`` for any other division."""
    placements, mesh = parameter.placements, parameter.device_mesh
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(dims) != 1 or not placements[dims[0]].is_shard(0):
        raise ValueError(
            f"the parameter {name!r} is divided as {placements}: expected rows divided among processes, Shard(0), "
            "once, as fully_shard does; measure a model without tensor parallelism and shard_placement_fn"
        )
    others = tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if dim not in dims)
    return Mesh(mesh.get_group(dims[0]), mesh.get_local_rank(dims[0]), mesh.size(dims[0]), others, mesh.size())


@contextmanager
def resharded(original: nn.Module) -> Iterator[None]:
    """Inside, FSDP units hold their shards; those that held whole weights do so again afterwards."""
    whole = []
    for unit in original.modules() if "torch.distributed.fsdp" in sys.modules else ():
        if is_unit(unit):
            before = list(unit.parameters())
            unit.reshard()  # type: ignore[operator]
            pairs = zip(before, unit.parameters(), strict=True)
            if any(now is not then and not hasattr(then, "to_local") for then, now in pairs):
                whole.append(unit)
    try:
        yield
    finally:
        for unit in whole:
            unit.unshard()  # type: ignore[operator]


def find_shards(original: LossModule) -> Shards | None:
    """Return how the weights of a model are divided; ``None`` where they are whole."""
    with resharded(original):
        return Shards(original) if any(hasattr(p, "to_local") for p in original.parameters()) else None


def moved(evaluation: Evaluation, w: Tensor) -> LossModule:
    """Return the original at another point, as a copy that shares all else."""
    tensors = {}
    with evaluation.held():
        views = evaluation.layout.views(w)
        for name, parameter in evaluation.parameters.items():
            value = views[name].to(parameter.dtype, copy=True).to(parameter.device)
            if hasattr(parameter, "to_local"):
                (value,) = like([parameter], [value])
            elif evaluation.shards is not None:
                (value,) = evaluation.shards.gatherer.whole([evaluation.rows[f"model.{name}"]], [value])
            tensors[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        return evaluation.original.private_copy(lambda tensor: tensors.get(id(tensor), tensor))
