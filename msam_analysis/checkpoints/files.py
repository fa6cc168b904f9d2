"""What a file is, told by its first bytes and not by its name."""

from __future__ import annotations

import json
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

from msam_analysis.checkpoints.scanning import MOST_BYTES

EXPECTED = "expected a .safetensors file or torch.save(model.state_dict(), path)"
SAFETENSORS, ARCHIVE, TORCHSCRIPT, LEGACY = "safetensors", "torch.save", "TorchScript", "old torch.save"

_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's number before every file of before version 1.6
_LONGEST_END = 2**16 + 200  # bytes in which the end of an archive lies
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


def reason_of(error: BaseException) -> str:
    """Return the first sentence of what a parser says, as part of a sentence of ours."""
    first = " ".join(str(error).split("\n")[0].split()).split(". ")[0][:120].strip(" .!?:;")
    return first or type(error).__name__


def json_of(path: Path) -> Any:
    """Return the content of a file of JSON; None where it cannot be read, is too long or too deep."""
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def _refuse_text(path: Path, head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise refusal(path, "is a git-lfs pointer and not the weights", "run git lfs pull where it lies")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise refusal(path, "is a web page", "the download gave a page in place of the file: fetch the file itself")
    if text.startswith((b"{", b"[")):
        content = json_of(path)
        if isinstance(content, dict) and "weight_map" in content:
            raise refusal(path, "is the index of a sharded checkpoint", f"pass the folder {path.parent}")
        raise refusal(path, "is text (JSON)", "pass the file with the weights, or its folder")


def _kind_of_zip(path: Path) -> str:
    size = path.stat().st_size
    if _directory_size(path) > MOST_BYTES:
        raise refusal(path, "lists more files than a checkpoint has", "check where it comes from")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, OverflowError, struct.error, ValueError):
        raise refusal(path, "is a torch.save file that was cut or damaged", "fetch it again") from None
    if any(info.header_offset + info.compress_size > size for info in records):
        raise refusal(path, "is a torch.save file that was cut or damaged", "fetch it again")
    names = [info.filename.rsplit("/", 1)[-1] for info in records]
    if "data.pkl" in names:
        _check_records(path, records, names, size)
        return TORCHSCRIPT if "constants.pkl" in names else ARCHIVE
    what = (
        "a NumPy archive" if names and all(name.endswith(".npy") for name in names) else "a zip archive of other things"
    )
    first = (names or ["nothing"])[0]
    raise refusal(path, f"is {what} (first: {first!a:.60})", "unpack it, and pass the file inside")


def _check_records(path: Path, records: list[zipfile.ZipInfo], names: list[str], size: int) -> None:
    """Refuse an archive that torch would read otherwise than it was looked at, or that holds more than it has."""
    if names.count("data.pkl") > 1:
        raise refusal(path, "holds two descriptions (data.pkl) of its content", "check where it comes from")
    read = [info for info in records if "/data/" in info.filename or info.filename.endswith("/data.pkl")]
    if len({info.filename for info in read}) < len(read):
        raise refusal(path, "holds two records of one name", "check where it comes from")
    if any(info.compress_type != zipfile.ZIP_STORED for info in read):
        raise refusal(path, "is a torch.save file that was compressed", "unpack it, and pack it with zip -0")
    if sum(info.file_size for info in read) > size:
        raise refusal(path, "claims to hold more than it has", "check where it comes from")


def _directory_size(path: Path) -> int:
    """Return the length of an archive's list of files as its end states it; 0 where it states none."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _LONGEST_END))
        end = stream.read()
    small, large = end.rfind(b"PK\x05\x06"), end.rfind(b"PK\x06\x06")
    known = int.from_bytes(end[small + 12 : small + 16], "little") if small >= 0 else 0
    return int.from_bytes(end[large + 40 : large + 48], "little") if known == 2**32 - 1 and large >= 0 else known
