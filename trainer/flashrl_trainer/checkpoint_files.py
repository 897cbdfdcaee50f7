"""A checkpoint folder's list of files with sizes and checksums, so that one that is damaged is told from a whole one.

Knows nothing of what the files hold; every rank reads its share of them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from flashrl_trainer.distributed import Ranks

LIST = "trainer.json"
_BLOCK_BYTES = 1 << 22


def seal(folder: Path, content: Mapping[str, Any], ranks: Ranks) -> None:
    """Write the list, with `content` beside it, once all ranks' files are there; OSError on every rank if it cannot.

    All is on the disk when this returns: a rename that outlives a power cut must not name files that do not.
    """
    names = ranks.on_main(lambda: sorted(file.name for file in folder.iterdir() if file.name != LIST))
    shares = ranks.gather({name: _described(folder / name) for name in _share(names, ranks)})

    def write() -> None:
        files = {name: description for share in shares for name, description in share.items()}
        body = {"files": dict(sorted(files.items())), **content}
        with (folder / LIST).open("w", encoding="utf-8") as file:
            json.dump(body | {"checksum": _checksum_of(body)}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)

    ranks.on_main(write)


def damage(folder: Path, ranks: Ranks) -> str:
    """What is wrong with the folder, the same on every rank; empty where each file is as it was sealed."""
    body = ranks.on_main(lambda: _read(folder))
    if isinstance(body, str):
        return body
    mine = (_difference(folder / name, body["files"][name]) for name in _share(sorted(body["files"]), ranks))
    found = ranks.gather(next((line for line in mine if line), ""))
    return ranks.broadcast(next((line for line in found if line), ""))


def looks_whole(folder: Path) -> bool:
    """Whether the files have their sizes: cheap, and blind to what changed inside."""
    body = _read(folder)
    return not isinstance(body, str) and not any(
        _size_difference(folder / name, described) for name, described in body["files"].items()
    )


def read_content(folder: Path) -> dict[str, Any]:
    """What was sealed beside the list."""
    body: dict[str, Any] = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return body


def sync_folder(folder: Path) -> None:
    """Have the folder's entries, a rename among them, on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(folder: Path) -> dict[str, Any] | str:
    try:
        body = read_content(folder)
        checksum = body.pop("checksum")
        return body if checksum == _checksum_of(body) else f"{LIST} has changed"
    except FileNotFoundError:
        return f"{LIST} is missing"
    except (OSError, ValueError, KeyError, AttributeError):
        return f"{LIST} cannot be read"


def _difference(file: Path, described: Mapping[str, Any]) -> str:
    if line := _size_difference(file, described):
        return line
    try:
        return "" if _described(file) == described else f"{file.name} has changed"
    except OSError as error:
        return f"{file.name}: {error.strerror or error}"


def _size_difference(file: Path, described: Mapping[str, Any]) -> str:
    try:
        size = file.stat().st_size
    except OSError as error:
        return f"{file.name}: {error.strerror or error}"
    return "" if size == described["bytes"] else f"{file.name} has {size:,} of {described['bytes']:,} bytes"


def _described(file: Path) -> dict[str, Any]:
    hasher, size = xxhash.xxh3_128(), 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            hasher.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": hasher.hexdigest()}


def _checksum_of(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _share(names: Iterable[str], ranks: Ranks) -> list[str]:
    return list(names)[ranks.rank :: ranks.world_size]
