"""Where and in what precision a run is computed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Precision = Literal["none", "bfloat16", "float16"]


@dataclass(frozen=True)
class Computing:
    """How a run is computed; device and precision change its bits, the interval of saving does not.

    Attributes
    ----------
    device
        ``"cpu"`` (default) or ``"cuda"``; of several GPUs, each process that torchrun started takes its own.
    amp
        Mixed precision of the training step's forward passes: ``"none"`` (default), ``"bfloat16"``, or ``"float16"``
        with a loss scale. Weights, optimizer and all that is recorded and measured stay in float32.
    save_every
        Epochs between two states that an interrupted run goes on from. ``None`` (default) keeps none, and the run
        begins anew; in a study it stands for the workload's number.

    Raises
    ------
    ValueError
        One of them is none of that, or there is no GPU.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    amp: Precision = "none"
    save_every: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would fail hours later."""
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"expected the device auto, cpu or cuda, got {self.device!r}")
        if self.amp not in get_args(Precision):
            raise ValueError(f"expected mixed precision (amp) of {', '.join(get_args(Precision))}, got {self.amp!r}")
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"expected a state to be saved every 1 or more epochs, got {self.save_every}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no GPU here: expected one for the device cuda; use cpu or auto")

    @property
    def torch_device(self) -> torch.device:
        """The device of this process."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a training step's forward pass."""
        if self.amp == "none":
            return nullcontext()
        return torch.autocast(self.device, getattr(torch, self.amp))

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a new loss scale where gradients could underflow, in float16."""
        return torch.amp.GradScaler(self.device) if self.amp == "float16" else None

    def __str__(self) -> str:
        """Say it in words, for a report."""
        but = f", but for the forward passes of training steps, in {self.amp} (autocast)"
        return f"on {'the CPU' if self.device == 'cpu' else 'a GPU'} in float32{'' if self.amp == 'none' else but}"


PLAIN = Computing()
"""On the CPU, in float32, without states in between."""


def computing(device: str = "auto", amp: str = "none", save_every: int | None = None) -> Computing:
    """Return what these words stand for: see :class:`Computing`; ``auto`` is ``cuda`` where torch finds a GPU."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return Computing(chosen, amp, save_every)  # type: ignore[arg-type]  # refused there


def repeatable() -> AbstractContextManager[object]:
    """Let convolutions on a GPU give the same bits every time, in float32 and not in TF32; on a CPU they do anyway."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
