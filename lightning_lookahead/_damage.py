"""Whether a checkpoint is whole, and what is wrong with its file if not."""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

if TYPE_CHECKING:
    import os
    from pathlib import Path


def is_whole(path: Path) -> bool:
    """Whether a file, or a folder of shards, has all of its parts as they were written."""
    try:
        if path.is_dir():
            return (path / "meta.pt").is_file() and damaged_part(path / "meta.pt") is None and _has_all_shards(path)
        return damaged_part(path) is None if is_archive(path) else _is_of_old(path)
    except Exception:  # noqa: BLE001 (of a file that cannot be read; of a list of shards, a pickle, whatever is wrong)
        return False


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a zip archive, as `torch.save` writes them, perhaps a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _is_of_old(path: Path) -> bool:
    """Whether a file is a whole one of before torch 1.6: it has no checksums and has to be read."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (whatever a damaged file raises)
        return forbidden_class(error) is not None
    return True


def _has_all_shards(path: Path) -> bool:
    """Whether each shard's file is as long as the folder's list says."""
    ends: dict[str, int] = {}
    for place in FileSystemReader(path).read_metadata().storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    return all((path / name).is_file() and (path / name).stat().st_size >= end for name, end in ends.items())


def damaged_part(path: str | os.PathLike[str], ending: str = "") -> str | None:
    """The name of the first part of a file that does not have its checksum in the file.

    Args:
        path: The file.
        ending: Only parts whose names end so are read.
    """
    name = "its list of parts"
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith(ending):
                    with file.open(name) as part:
                        while part.read(2**20):
                            pass
    except OSError:
        raise
    except Exception:  # noqa: BLE001 (whatever a damaged archive raises)
        return name
    return None


def forbidden_class(error: Exception) -> tuple[str, str] | None:
    """The class that ``torch.load(weights_only=True)`` has refused, if so, and how to allow it alone."""
    blocked = re.search(r"unsupported GLOBAL ([\w.]+) whose module", str(error))
    if blocked:
        return blocked.group(1), ""
    found = re.search(r"GLOBAL ([\w.]+) was not an allowed global|Unsupported class[: ]+([\w.]+)", str(error))
    if not found:
        return None
    name = found.group(1) or found.group(2)
    if name == "getattr":  # unpickles nested classes
        return "an object of a class that is defined inside another one, or a method", ""
    allow = f", or allow this class alone: torch.serialization.add_safe_globals([{name.rpartition('.')[2]}])"
    return f"an object of class {name}", allow


def what_is_damaged(path: Path) -> str:
    """What is wrong with a file, in a few words."""
    if not path.is_file():
        return f"{path.name} is missing"
    if not path.stat().st_size:
        return "it is empty"
    if not is_archive(path):
        return "it is cut off, or no file of torch.save"
    part = damaged_part(path)
    return (
        "its shards are not whole"
        if part is None and path.name == "meta.pt"
        else f"{part or 'its structure'} is damaged"
    )
