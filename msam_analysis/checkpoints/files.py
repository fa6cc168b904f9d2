"""What a file is, told by its first bytes and not by its name."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

EXPECTED = "expected a .safetensors file or torch.save(model.state_dict(), path)"
SAFETENSORS, ARCHIVE, TORCHSCRIPT, LEGACY = "safetensors", "torch.save", "TorchScript", "old torch.save"

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's number before every file of before version 1.6
_CONVERT = "convert it with the library that wrote it"
_OTHERS = {
    b"\x1f\x8b": ("a gzip file", "unpack it with gunzip"),
    b"BZh": ("a bzip2 file", "unpack it with bunzip2"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it with unzstd"),
    b"Rar!": ("a RAR archive", "unpack it with unrar"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it with 7z x"),
    b"\x89HDF": ("an HDF5 file, as Keras writes them", _CONVERT),
    b"GGUF": ("a GGUF file, whose weights are quantised", _CONVERT),
    b"\x93NUMPY": ("a NumPy array", _CONVERT),
    b"\x7fELF": ("a program", "pass the file with the weights"),
    b"%PDF": ("a PDF document", "pass the file with the weights"),
    b"\x89PNG": ("a picture", "pass the file with the weights"),
}
_KINDS_OF_NODES = {
    stat.S_ISFIFO: "a FIFO (named pipe)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def kind_of(path: Path) -> str:
    """Return ``SAFETENSORS``, ``ARCHIVE``, ``TORCHSCRIPT`` or ``LEGACY``.

    Raises ValueError: It is something else; the message says what, and what to do.
    """
    found = path.stat()
    mode, size = found.st_mode, found.st_size
    if node := next((name for holds, name in _KINDS_OF_NODES.items() if holds(mode)), None):
        raise refusal(path, f"is {node}", "save its content to a file first")
    if size == 0:
        raise refusal(path, "is empty", "the copy or the writing was interrupted: fetch it again")
    with path.open("rb") as stream:
        head = stream.read(4096)
    _refuse_text(path, head)
    if other := next((it for start, it in _OTHERS.items() if head.startswith(start)), None):
        raise refusal(path, f"is {other[0]}", other[1])
    if head[257:262] == b"ustar":
        raise refusal(path, "is a tar archive", "unpack it with tar -xf and pass the file or folder inside")
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if len(head) > 8 and head[8:9] == b"{":
        length = int.from_bytes(head[:8], "little")
        if length + 8 > size:
            raise refusal(path, "is a safetensors file that was cut", "fetch it again")
        return SAFETENSORS
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]:
        return LEGACY
    if head[:1] == b"\x80":
        raise refusal(
            path, "is a plain pickle", "load it where it was made, and save its tensors; nothing in it was run"
        )
    raise refusal(path, "cannot be read as weights: it is damaged or of another kind", "check where it comes from")


def refusal(path: Path, what: str, way: str) -> ValueError:
    """Return the error that says what ``path`` is, what was expected and what to do."""
    return ValueError(f"{path} {what}: {EXPECTED}; {way}")


def _refuse_text(path: Path, head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise refusal(path, "is a git-lfs pointer and not the weights", "run git lfs pull where it lies")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise refusal(path, "is a web page", "the download gave a page in place of the file: fetch the file itself")
    if text.startswith((b"{", b"[")):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and "weight_map" in content:
            raise refusal(path, "is the index of a sharded checkpoint", f"pass the folder {path.parent}")
        raise refusal(path, "is text (JSON)", "pass the file with the weights, or its folder")


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.rsplit("/", 1)[-1] for name in archive.namelist()]
            short = any(info.header_offset + info.compress_size > path.stat().st_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise refusal(path, "is a torch.save file that was cut or damaged", "fetch it again") from None
    if short:
        raise refusal(path, "is a torch.save file that was cut or damaged", "fetch it again")
    if "constants.pkl" in names and "data.pkl" in names:
        return TORCHSCRIPT
    if "data.pkl" in names:
        return ARCHIVE
    what = (
        "a NumPy archive" if names and all(name.endswith(".npy") for name in names) else "a zip archive of other things"
    )
    raise refusal(path, f"is {what} (first: {(names or ['nothing'])[0]!r})", "unpack it, and pass the file inside")
