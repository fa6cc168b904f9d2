"""The device ``second``: compiled once, registered in a process for good, and asked how often the host has read."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import cpp_extension
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

from tests.programs import alone

NAME = "second"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SOURCE = Path(__file__).with_name("second.cpp")
FOLDER = Path(__file__).parents[2] / "build" / "second_device"


def compiled(folder: Path = FOLDER) -> Path:
    """Return the compiled device, made at the first call, whichever process makes it."""
    assert COMPILER is not None, "expected a C++ compiler"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    command = [COMPILER, "-shared", "-fPIC", "-O0", "-w", "-std=c++17", abi, *include, str(SOURCE), *libraries]
    key = hashlib.sha256(repr((command, torch.__version__, SOURCE.read_text(encoding="utf-8"))).encode()).hexdigest()
    library = folder / f"{key[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not library.exists():
            made = library.with_suffix(".part")  # a build that is cut short leaves nothing that looks whole
            subprocess.run([*command, "-o", str(made)], check=True)
            made.replace(library)
    return library


class Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Do nothing: random numbers come from the CPU's generator."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register(library: Path, *, doubles: bool = True) -> Callable[[], int]:
    """Register the device in this process, before its first backward pass; return the count of the host's reads.

    ``doubles``: whether it has float64.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.second_device_register()
    if not doubles:
        loaded.second_device_loses_doubles()
    rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module)
    generate_methods_for_privateuse1_backend()
    reads: Callable[[], int] = loaded.second_device_reads
    return reads
