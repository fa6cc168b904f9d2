"""To the displaced weights and back: what was applied is noted, and exactly that is taken away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ._arithmetic import add_scaled_, scaled
from ._directed import DirectedOptimizer, Move

__all__ = ["BOOKKEEPING", "DisplacedOptimizer", "Restore", "Way"]

Restore = Literal["auto", "subtract", "copy"]
Way = Literal["stay", "subtract", "copy"]

BOOKKEEPING: dict[str, Any] = {"standing": None, "applied": None}
"""What a group keeps beside torch's options, and its value while nothing is displaced."""


class DisplacedOptimizer(DirectedOptimizer):
    """Moves the weights by what :class:`DirectedOptimizer` plans, and knows the way back.

    ``standing`` of a group says which of its parameters are displaced, ``applied`` by what multiple c of their
    direction. A parameter comes back in one of two ways: *subtract* takes ``c · direction`` away again and needs no
    memory; *copy* keeps the true weight in ``state[p]["true_weight"]`` while it is displaced. In eval mode the roles
    change: the weights are the true ones, and ``state[p]["perturbed_weight"]`` keeps what subtracting could not bring
    back to the bit (of "gradient" both copies are needed, and the two swap places).
    """

    _restore_policy: Restore

    # ---------------------------------------------------------------- what users see

    @property
    def perturbed(self) -> bool:
        """Whether parameters are displaced right now."""
        return bool(self._head["training"]) and any(any(group["standing"] or ()) for group in self.param_groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Switch to the true weights, to evaluate or save them; :meth:`train` switches back. Idempotent."""
        if not self._head["training"]:
            return
        for group, way, members in self._displaced():
            states = [self.state[p] for p in members]
            if way == "subtract":
                # adding back in train() need not return the very bits, so they are kept
                for p, state in zip(members, states, strict=True):
                    state["perturbed_weight"] = p.detach().clone()
                self._bring_back(group, way, members)
            elif self._direction_name == "gradient":
                _swap(members, [state["true_weight"] for state in states])
            else:
                self._bring_back(group, way, members)
                for state in states:
                    del state["true_weight"]
        self._head["training"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Switch back to the perturbed weights. Idempotent.

        Weights changed since :meth:`eval` are displaced from where they are now; unchanged ones return bit for bit.
        Between ``first_step()`` and ``second_step()`` all return to where they were.
        """
        if self._head["training"]:
            return
        for group, way, members in self._displaced():
            if way == "copy" and self._direction_name == "gradient":
                _swap(members, [self.state[p]["true_weight"] for p in members])
            elif way == "copy":
                self._keep_copies(members)
                add_scaled_(members, self._shaped(members), group["applied"])
            else:
                kept = [self.state[p].pop("perturbed_weight") for p in members]
                were = [before.clone() for before in kept]
                add_scaled_(were, self._directions(members), -group["applied"])
                unchanged = [p == w for p, w in zip(members, were, strict=True)]
                add_scaled_(members, self._directions(members), group["applied"])
                for p, same, before in zip(members, unchanged, kept, strict=True):
                    p.copy_(torch.where(same, before, p))
        self._head["training"] = True

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Hold the true weights inside a ``with`` block; nests, and survives exceptions."""
        was_training = self._head["training"]
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    @torch.no_grad()
    def displacement(self) -> dict[Tensor, Tensor]:
        """Return ε at which this step's training gradient is, or for "gradient" will be, evaluated.

        Returns
        -------
        dict of Tensor to Tensor
            ε relative to the true weights, by parameter and of its shape; parameters that are not displaced are absent.
        """
        result: dict[Tensor, Tensor] = {}
        if self._direction_name == "gradient" and not self._displacement_stands:
            for _, members, factor in self._plan():
                result |= zip(members, scaled(self._shaped(members), factor), strict=True)
            return result
        for group, way, members in self._displaced():
            copies = [self.state[p].get("true_weight") for p in members]
            if way == "copy" and copies[0] is not None:
                here, there = (members, copies) if self._head["training"] else (copies, members)
                result |= zip(members, torch._foreach_sub(here, there), strict=True)
            else:
                result |= zip(members, scaled(self._shaped(members), group["applied"]), strict=True)
        return result

    # ---------------------------------------------------------------- there

    def _displace(self, plan: list[Move]) -> None:
        """Move to w + ε, from the true weights or from what still stands, and note what was done."""
        if not plan:
            self._restore()
        for group, members, factor in plan:
            moved = set(map(id, members))
            standing = [id(p) in moved for p in group["params"]]
            copied = [p for p in members if self._needs_copy(p)]
            change = factor
            if group["standing"] is not None:
                if standing == group["standing"] and not copied:
                    change = factor - group["applied"]
                else:
                    self._restore_group(group)
            self._keep_copies(copied)
            for p in members:
                if not self._needs_copy(p):
                    self.state[p].pop("true_weight", None)  # left by a state saved under another policy
            add_scaled_(members, self._shaped(members), change, finite=self._direction_name != "gradient")
            group["standing"] = standing
            if group["applied"] is None:
                group["applied"] = factor.clone()
            else:
                group["applied"].copy_(factor)  # in place, so that a captured graph finds it again

    def _needs_copy(self, p: Tensor) -> bool:
        """Whether adding and subtracting would lose digits, or cannot be repeated."""
        if self._restore_policy != "auto":
            return self._restore_policy == "copy"
        lasts = self.perturbation is not None and self.perturbation.lasts
        return not lasts or p.dtype not in (torch.float32, torch.float64)

    def _keep_copies(self, members: list[Tensor]) -> None:
        for p in members:
            state = self.state[p]
            if "true_weight" in state:
                state["true_weight"].copy_(p)
            else:
                state["true_weight"] = p.detach().clone()

    # ---------------------------------------------------------------- and back

    @property
    def _displacement_stands(self) -> bool:
        return any(group["standing"] is not None for group in self.param_groups)

    def _ways(self, group: dict[str, Any]) -> list[tuple[Way, list[Tensor]]]:
        """Sort a group's parameters by how they come back to the true weights; "stay" are those already there."""
        ways: dict[Way, list[Tensor]] = {"stay": [], "subtract": [], "copy": []}
        standing = group["standing"] or [False] * len(group["params"])
        for p, stands in zip(group["params"], standing, strict=True):
            if not stands:
                ways["stay"].append(p)
            elif self._head["training"]:
                ways["copy" if "true_weight" in self.state[p] else "subtract"].append(p)
            else:
                ways["subtract" if "perturbed_weight" in self.state[p] else "copy"].append(p)
        return [(way, members) for way, members in ways.items() if members]

    def _displaced(self) -> Iterator[tuple[dict[str, Any], Way, list[Tensor]]]:
        """Yield the parameters whose displacement stands, by group and way back."""
        for group in self.param_groups:
            for way, members in self._ways(group):
                if way != "stay":
                    yield group, way, members

    def _sources(self, way: Way, members: list[Tensor]) -> list[Tensor]:
        """Return what brings each parameter back: its copy, or its direction."""
        return [self.state[p]["true_weight"] for p in members] if way == "copy" else self._directions(members)

    def _bring_back(self, group: dict[str, Any], way: Way, members: list[Tensor]) -> None:
        """Take away exactly what stands."""
        if not members or way == "stay":
            return
        if way == "copy":
            torch._foreach_copy_(members, self._sources(way, members))
        else:
            add_scaled_(members, self._sources(way, members), -group["applied"])

    def _forget(self, group: dict[str, Any]) -> None:
        """Note that nothing stands any more."""
        group["standing"] = None
        if self._direction_name == "gradient":
            for p in group["params"]:
                self.state[p].pop("true_weight", None)

    def _restore_group(self, group: dict[str, Any]) -> None:
        for way, members in self._ways(group):
            self._bring_back(group, way, members)
        self._forget(group)

    def _restore(self) -> None:
        """Return to the true weights for good."""
        for group in self.param_groups:
            self._restore_group(group)


def _swap(these: list[Tensor], those: list[Tensor]) -> None:
    """Exchange the values of two lists of tensors."""
    for a, b in zip(these, those, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
