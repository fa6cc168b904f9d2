"""A script: run a recipe as if torchvision were not installed, and save the weights of every forward pass.

``python watched.py RECIPE FILE``. The file holds, for each network in the order of appearance, a list of
``(training, weights)``: its mode, and all of its parameters as one vector.
"""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

HIDDEN = "torchvision"  # imported by both frameworks if it is there, which fails if it was built for another torch
distribution_of = importlib.metadata.Distribution.from_name


def visible(name: str) -> importlib.metadata.Distribution:
    """What ``importlib.metadata`` finds under a name; nothing under the hidden one."""
    if name == HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution_of(name)


def refuse_connections(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise where a connection would be made: an audit hook."""
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"expected no use of the network, got {event}{arguments[1:]}.")


def main(recipe: Path, file: Path) -> None:
    """Run the recipe and save what was seen."""
    seen: dict[nn.Module, list[tuple[bool, Tensor]]] = {}

    def look(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Sequential):
            weights = nn.utils.parameters_to_vector(module.parameters()).detach().cpu().clone()
            seen.setdefault(module, []).append((module.training, weights))

    nn.modules.module.register_module_forward_pre_hook(look)
    warnings.filterwarnings(  # Lightning's own, of torch's trees
        "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", module=r"lightning\.pytorch\.utilities\._pytree"
    )
    sys.addaudithook(refuse_connections)
    sys.path[0] = str(recipe.parent)
    with patch.dict(sys.modules, {HIDDEN: None}), patch.object(importlib.metadata.Distribution, "from_name", visible):
        runpy.run_path(str(recipe), run_name="__main__")
    torch.save(list(seen.values()), file)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
