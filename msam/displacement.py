"""The displacement ε while it stands: how the weights get to w + ε, and back to the very weights they came from."""

from __future__ import annotations

import hashlib
import math
import warnings
import weakref
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .perturbation import Perturbation, scaled, widest_dtype
from .schedules import Number, Schedule, require_strength
from .shards import WHOLE, Groups, here, like, part_of, parted
from .writes import Watch

__all__ = ["BOOKKEEPING", "COPIES", "Displacement", "Move", "Restore"]

Restore = Literal["auto", "subtract", "copy"]

_PARAMS, _LR = itemgetter("params"), itemgetter("lr")
_LAYOUT = attrgetter("shape", "dtype", "is_cpu")
_EXACT = (torch.float32, torch.float64)  # dtypes in which "auto" adds and subtracts, and loses no digit that matters

BOOKKEEPING: dict[str, Any] = {"standing": None, "applied": None}
"""The entries of a group that describe its displacement, with their values while nothing is displaced."""

COPIES = ("true_weight", "perturbed_weight")
"""The entries of a parameter's state that keep its other weights while it is displaced."""


class Move(NamedTuple):
    """The displacement that one parameter group is to get: ``ε = factor · along``."""

    group: dict[str, Any]
    members: list[Tensor]
    along: list[Tensor]
    factor: Tensor  # 0-dimensional; NaN where the gradients overflowed, and then nothing moves


class Displacement:
    """Displaces the parameters of an optimizer, knows which of them are displaced, and takes exactly that back.

    ``group["standing"]`` says which parameters of a group are displaced, ``group["applied"]`` by which multiple c of
    their direction. There are two ways back. *Subtract* takes ``c · direction`` away again and needs no memory. *Copy*
    keeps the true weight in ``state[p]["true_weight"]`` while the parameter is displaced. While the displacement is
    suspended (eval mode) the true weights are in place, and ``state[p]["perturbed_weight"]`` keeps what adding
    ``c · direction`` could not bring back to the bit. Along "gradient" both weights are needed: the copy and the
    parameter swap their values.

    All of this lies in the optimizer's groups and states, where torch saves, copies and loads it; so do the options
    that are read here: ``rho``, ``lr``, ``first_lr``, ``largest_lr``, ``maximize``, ``perturb``, ``displaces`` of each
    group, and ``steps`` and ``training`` of the first.

    Parameters
    ----------
    optimizer : Optimizer
        Owner of the parameters; held weakly.
    perturbation : Perturbation or None
        The displacement that is wanted; None displaces nothing.
    restore : {"auto", "subtract", "copy"}
        Way back to the true weights.
    momentum_key : str
        Name of the momentum buffer in the optimizer's state.

    Raises
    ------
    TypeError
        If the perturbation is of another type.
    ValueError
        If ``restore`` is unknown, or subtracts what will not be known any more.
    """

    def __init__(
        self, optimizer: Optimizer, perturbation: Perturbation | None, restore: Restore, momentum_key: str
    ) -> None:
        if perturbation is not None and not isinstance(perturbation, Perturbation):
            raise TypeError(
                f"perturbation must be a Perturbation or None, got {type(perturbation).__name__}; "
                "build one with msam.Perturbation(direction=..., rho=...)."
            )
        if restore not in get_args(Restore):
            raise ValueError(f"restore must be one of {', '.join(get_args(Restore))}, got {restore!r}; use 'auto'.")
        lasts = perturbation is None or perturbation.lasts
        if restore == "subtract" and perturbation is not None and not lasts:
            raise ValueError(
                "restore='subtract' needs the direction unchanged until the next step and no scaling by weights, "
                f"got direction={perturbation.direction!r}, scale={perturbation.scale!r}; use restore='auto'."
            )
        direction = None if perturbation is None else perturbation.direction
        self.perturbation = perturbation
        self.restore = restore
        self.norm: Tensor | None = None  # of what the last displacement was planned along, where it was needed
        self.among: Groups = ()  # processes that share the parameters, each having some of them
        self.climbs = direction == "gradient"  # two gradients a step, and nothing stands between steps
        # what a saved displacement is a multiple of, in words
        self.along = None if perturbation is None else f"{direction}, scaled {perturbation.scale}"
        # where the direction lies in a parameter's state; gradient and noise are not there
        self.key = {"momentum": momentum_key, "last_gradient": "last_gradient"}.get(str(direction))
        self._watch = Watch()
        self._spare: dict[Tensor, Tensor] = {}  # SAM's copies on the CPU, where new memory costs as much as the rest
        # dtypes that come back by subtraction; None where all do
        self._subtracted = None if restore == "subtract" else _EXACT if restore == "auto" and lasts else ()
        self._owner: Any = weakref.proxy(optimizer)  # no cycle: an optimizer is freed with its last reference

    # ---------------------------------------------------------------- what stands

    @property
    def stands(self) -> bool:
        """Whether there is a displacement, suspended or not."""
        return any(group["standing"] is not None for group in self._owner.param_groups)

    def copied_and_subtracted(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return a group's displaced parameters: those that come back from a copy, and those by subtraction."""
        copied: list[Tensor] = []
        subtracted: list[Tensor] = []
        if group["standing"] is not None:
            training = self._owner.param_groups[0]["training"]
            for p, stands in zip(group["params"], group["standing"], strict=True):
                if stands:
                    state = self._owner.state[p]
                    from_copy = "true_weight" in state if training else "perturbed_weight" not in state
                    (copied if from_copy else subtracted).append(p)
        return copied, subtracted

    def copies(self, members: list[Tensor]) -> list[Tensor]:
        """Return the tensors that keep the parameters' other weights: the true ones, or in eval mode the perturbed."""
        return [self._owner.state[p]["true_weight"] for p in members]

    def tensors(self) -> dict[Tensor, Tensor]:
        """Return ε by parameter: the one that stands, or along "gradient" the one that ``apply`` would make now."""
        result: dict[Tensor, Tensor] = {}
        if self.climbs and not self.stands:
            for _, members, along, factor in self.planned():
                result |= zip(members, like(members, scaled(along, factor)), strict=True)
            return result
        training = self._owner.param_groups[0]["training"]
        for group in self._owner.param_groups:
            copied, members = self.copied_and_subtracted(group)
            if training or self.climbs:
                weights, copies = here(copied), here(self.copies(copied))
                now, then = (weights, copies) if training else (copies, weights)
                shift = [a - b for a, b in zip(now, then, strict=True)]
                result |= zip(copied, like(copied, shift), strict=True)
            else:
                members = copied + members
            if members:
                shift = scaled(here(self._shaped(members)), group["applied"])
                result |= zip(members, like(members, shift), strict=True)
        return result

    def growth(self) -> float:
        """Return by which factor the gradient that is there is longer than the one that was climbed; 0 if unknown."""
        pairs = map(self.copied_and_subtracted, self._owner.param_groups)
        members = [p for some in chain.from_iterable(pairs) for p in some if p.grad is not None]
        if not members or self.perturbation is None or self.norm is None:
            return 0.0
        norm = self.perturbation.norm(self._directions(members), members, self.among)
        return 0.0 if norm is None or not self.norm else float(norm / self.norm)

    # ---------------------------------------------------------------- saved states

    def make_state(self) -> None:
        """Make what a saved state holds while the weights are displaced, without displacing them."""
        for group in self._owner.param_groups:
            group["applied"] = torch.zeros((), dtype=widest_dtype(group["params"]), device=group["params"][0].device)
            for p, chosen in zip(group["params"], group["displaces"], strict=True):
                if self.key == "last_gradient" and p.grad is not None:
                    self._owner.state[p]["last_gradient"] = p.grad.detach().clone()
                copied = self._subtracted is not None and p.dtype not in self._subtracted
                if group["perturb"] and chosen and not self.climbs and copied:
                    self._owner.state[p]["true_weight"] = p.detach().clone()

    def require_way_back(self, state: dict[str, Any], training: bool) -> None:
        """Raise unless the saved state of a displaced parameter has what takes the displacement back."""
        lasts = self.perturbation is None or self.perturbation.lasts
        copies = () if lasts or not (training or self.climbs) else ("true_weight",)
        for key in (*([self.key] if self.key and "true_weight" not in state else ()), *copies):
            if key not in state:
                raise ValueError(
                    f"expected {key!r} of every displaced parameter, got a state without it; save all of the state, or "
                    "save it in eval() mode."
                )

    # ---------------------------------------------------------------- what others write meanwhile

    def notice_writes(self) -> None:
        """Let what others wrote to displaced parameters be their true weights: their ε is dropped, with a warning."""
        groups = self._owner.param_groups
        if not (self._watch.versions and groups[0]["training"]):
            return
        written = self._watch.written(list(chain.from_iterable(map(_PARAMS, groups))))
        if not any(written):
            return
        flags, count = iter(written), 0
        for group in groups:
            new = [next(flags, False) for _ in group["params"]]
            if group["standing"] is None:
                continue
            for p, stands, writes in zip(group["params"], group["standing"], new, strict=True):
                if stands and writes:
                    self._owner.state[p].pop("true_weight", None)
                    count += 1
            group["standing"] = [stands and not writes for stands, writes in zip(group["standing"], new, strict=True)]
        if count:
            warnings.warn(
                f"expected writes to weights in eval() or inside unperturbed(), got {count} parameters written while "
                "displaced, and what was written counts as their true weights; load, average, clamp or mask weights "
                "inside optimizer.unperturbed().",
                stacklevel=2,
            )
            self.look()

    def look(self) -> None:
        """Remember the parameters as they stand, to notice later that others wrote to them."""
        self._watch.look(list(chain.from_iterable(map(_PARAMS, self._owner.param_groups))))

    def forget(self) -> None:
        """Remember nothing: what stands when the next move is made counts as what was left."""
        self._watch.forget()

    # ---------------------------------------------------------------- there and back

    def apply(self) -> None:
        """Move to w + ε, from the true weights or from the multiple that still stands, and note what was done."""
        if self.key == "last_gradient":
            self._remember_gradients()
        moves = self.planned()
        if not moves:
            for group in self._owner.param_groups:
                self.take_back(group)
        for group, members, along, factor in moves:
            moved = set(map(id, members))
            standing = [id(p) in moved for p in group["params"]]
            copied = []
            for p in members:
                if self._subtracted is not None and p.dtype not in self._subtracted:
                    copied.append(p)
                else:
                    self._owner.state[p].pop("true_weight", None)  # left by a state saved under another policy
            if copied or standing != group["standing"]:
                self.take_back(group)
            self._keep_copies(copied)
            change = factor if group["standing"] is None else factor - group["applied"]
            add_scaled_(members, along, change, finite=not self.climbs)
            group["standing"] = standing
            if group["applied"] is None:
                group["applied"] = factor.clone()
            else:
                group["applied"].copy_(factor)  # in place, so that a captured graph finds it again
        if moves:
            self.look()

    def take_back(self, group: dict[str, Any]) -> None:
        """Return a group to the true weights for good, by taking away exactly what was applied."""
        if group["standing"] is None:
            return
        copied, subtracted = self.copied_and_subtracted(group)
        if copied:
            parts = parted(copied)
            torch._foreach_copy_(parts(copied), parts(self.copies(copied)))
        if subtracted:
            add_scaled_(subtracted, self._directions(subtracted), -group["applied"])
        group["standing"] = None
        if self.climbs:
            self.forget()  # the true weights are anybody's to write
            for p in group["params"]:
                self._owner.state[p].pop("true_weight", None)

    def take_back_all(self) -> None:
        """Return all groups to the true weights for good, from wherever others left them."""
        self.notice_writes()
        for group in self._owner.param_groups:
            self.take_back(group)

    def moved_to(self, group: dict[str, Any], multiple: float) -> None:
        """Note that a base step itself has left all of a group's weights displaced by another multiple."""
        group["applied"].fill_(multiple)

    def suspend(self) -> None:
        """Put the true weights in place, until :meth:`resume`."""
        self.notice_writes()
        for group in self._owner.param_groups:
            copied, subtracted = self.copied_and_subtracted(group)
            for p in subtracted:  # adding back in resume() need not return the very bits, so they are kept
                self._owner.state[p]["perturbed_weight"] = p.detach().clone()
            if subtracted:
                add_scaled_(subtracted, self._directions(subtracted), -group["applied"])
            if self.climbs:
                _swap(copied, self.copies(copied))
            else:
                for p in copied:
                    p.copy_(self._owner.state[p].pop("true_weight"))
        self._owner.param_groups[0]["training"] = False

    def resume(self) -> None:
        """Put the displaced weights in place again.

        Weights changed since :meth:`suspend` are displaced from where they are now; unchanged ones return bit for bit.
        Along "gradient" all return to where they were.
        """
        for group in self._owner.param_groups:
            copied, subtracted = self.copied_and_subtracted(group)
            if self.climbs:
                _swap(copied, self.copies(copied))
            elif copied:
                self._keep_copies(copied)
                add_scaled_(copied, self._shaped(copied), group["applied"])
            for p in subtracted:  # one after the other, so that the same few pages serve all
                before, along = self._owner.state[p].pop("perturbed_weight"), self._directions([p])
                was = before.clone()
                add_scaled_([was], along, -group["applied"])
                unchanged = p == was
                add_scaled_([p], along, group["applied"])
                p.copy_(torch.where(unchanged, before, p))
        self._owner.param_groups[0]["training"] = True
        self.look()

    def _keep_copies(self, members: list[Tensor]) -> None:
        """Copy weights, in place where there is a copy, so that a captured graph finds it again."""
        kept = []
        for p in members:
            state, spare = self._owner.state[p], self._spare.get(p)
            if "true_weight" not in state and spare is not None and _LAYOUT(spare) == _LAYOUT(p):
                state["true_weight"] = spare
            if "true_weight" in state:
                kept.append(p)
                continue
            state["true_weight"] = p.detach().clone()
            if self.climbs and p.is_cpu and type(p) in WHOLE and not torch.compiler.is_compiling():
                self._spare[p] = state["true_weight"]
        if kept:
            parts = parted(kept)
            torch._foreach_copy_(parts(self.copies(kept)), parts(kept))

    def hand_out(self) -> None:
        """Write no more to the copies that are there, because somebody else has them now."""
        self._spare.clear()

    # ---------------------------------------------------------------- which way, and how far

    def planned(self) -> list[Move]:
        """Return the displacement that the perturbation asks for now, group by group; empty where nothing moves."""
        groups, perturbation = self._owner.param_groups, self.perturbation
        if perturbation is None:
            return []
        rhos = [*map(self._rho, groups)]
        if all(not isinstance(rho, Tensor) and rho == 0 for rho in rhos):
            return [Move(group, [], [], torch.zeros(())) for group in groups] if self.climbs else []
        members = [*map(self._movable, groups)]
        flat = [*chain.from_iterable(members)]
        directions = self._directions(flat)
        norm = self.norm = perturbation.norm(directions, flat, self.among)
        if not WHOLE.issuperset(map(type, flat)):
            directions, flat = here(directions), here(flat)
        factors = perturbation.factors(directions, flat, rhos, [*map(_LR, groups)], norm)
        shaped = iter(perturbation.shaped(directions, flat))
        moves = []
        for group, some, factor in zip(groups, members, factors, strict=True):
            negated = group["maximize"] and perturbation.direction in ("gradient", "last_gradient")
            moves.append(Move(group, some, [*islice(shaped, len(some))], -factor if negated else factor))
        return moves

    def _rho(self, group: dict[str, Any]) -> Number:
        rho: Number | Schedule = group["rho"]
        if not isinstance(rho, Schedule):
            return rho
        if rho.varies and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a captured graph repeats one rho, got a schedule that varies by step; set the group's 'rho' to a "
                "tensor and fill it before each replay."
            )
        ratio = _lr_ratio(group) if rho.follows_lr else 1.0
        value: Number = rho(int(self._owner.param_groups[0]["steps"]) if rho.varies else 0, ratio)
        require_strength(value)
        return value

    def _movable(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the parameters of a group that move now: chosen, trainable, and with a direction."""
        members = []
        if group["perturb"]:
            for p, chosen in zip(group["params"], group["displaces"], strict=True):
                if chosen and p.requires_grad:
                    direction = p.grad if self.climbs else self._owner.state[p].get(self.key) if self.key else p
                    if direction is not None:
                        members.append(p)
        return members

    def _directions(self, members: list[Tensor]) -> list[Tensor]:
        """Return the raw directions d of parameters that have one."""
        if self.climbs:
            return [p.grad for p in members if p.grad is not None]
        if self.key is not None:
            return [self._owner.state[p][self.key] for p in members]
        order = {p: i for i, p in enumerate(p for group in self._owner.param_groups for p in group["params"])}
        return [self._noise(p, order[p]) for p in members]

    def _shaped(self, members: list[Tensor]) -> list[Tensor]:
        """Return the tensors that ε is a multiple of, at weights that are the true ones if they matter."""
        directions = self._directions(members)
        return directions if self.perturbation is None else self.perturbation.shaped(directions, members)

    def _noise(self, p: Tensor, index: int) -> Tensor:
        """Return the Gaussian noise of this step for the parameter of this index."""
        key = f"{self.perturbation and self.perturbation.seed} {int(self._owner.param_groups[0]['steps'])} {index}"
        key += "".join(f" {dist.get_rank(group)}" for group in self.among)  # each process counts its own parameters
        generator = torch.Generator(p.device)
        digest = hashlib.blake2b(key.encode(), digest_size=7).digest()  # generators seeded by counters would correlate
        generator.manual_seed(int.from_bytes(digest, "big"))
        return part_of(p, torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype))

    def _remember_gradients(self) -> None:
        """Keep this step's gradients, which are the next step's direction."""
        for group in self._owner.param_groups:
            for p in group["params"]:
                state = self._owner.state[p]
                if p.grad is None:
                    state.pop("last_gradient", None)
                elif "last_gradient" in state:
                    state["last_gradient"].copy_(p.grad)
                else:
                    state["last_gradient"] = p.grad.detach().clone()


def _lr_ratio(group: dict[str, Any]) -> Number:
    """Return the learning rate over the group's first one, or over the largest so far where the first one was 0."""
    lr: Number = group["lr"]
    if group["first_lr"]:
        return lr / float(group["first_lr"])
    if isinstance(lr, Tensor):
        group["largest_lr"] = torch.maximum(lr, torch.as_tensor(group["largest_lr"]).to(lr))
        return torch.where(lr > 0, lr / group["largest_lr"], torch.zeros_like(lr))
    group["largest_lr"] = max(lr, float(group["largest_lr"]))
    return lr / float(group["largest_lr"]) if lr else 0.0


def add_scaled_(weights: list[Tensor], directions: list[Tensor], factor: Tensor, *, finite: bool = True) -> None:
    """Add ``factor · direction`` to each weight in place, without reading ``factor`` on the host of a GPU.

    ``factor`` is 0-dimensional. With ``finite=False`` a factor of NaN adds nothing, whatever the directions hold.
    """
    if not weights:
        return
    if not WHOLE.issuperset(map(type, weights)):
        weights, directions = here(weights), here(directions)
    if weights[0].is_cpu and factor.is_cpu and not torch.compiler.is_compiling():
        # on the CPU a scalar is free to read, and spares the product's memory
        multiple = factor.item()
        if finite or not math.isnan(multiple):
            torch._foreach_add_(weights, directions, alpha=multiple)
        return
    factors = {device: factor.to(device, non_blocking=True) for device in {w.device for w in weights}}
    for device, local in factors.items():
        some = [i for i, w in enumerate(weights) if w.device == device]
        along = [directions[i] for i in some]
        product = list(torch._foreach_mul(along, local)) if finite else scaled(along, local)
        torch._foreach_add_([weights[i] for i in some], product)


def _swap(these: list[Tensor], those: list[Tensor]) -> None:
    """Exchange the values of two lists of tensors."""
    for a, b in zip(these, those, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
