"""An update as a file in a private folder, for engines that are told of it by name: vLLM's own server has no other way.

The folder is where both sides meet: `weights.json` says what the engine holds, the updates are the concatenated chunks
of their manifests. Knows files and who may write them; knows nothing of engines.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flashrl_rollout.stage_dir import make_private
from flashrl_rollout.transfer import RawBuffer
from flashrl_wire import codec
from flashrl_wire.delta import Change
from flashrl_wire.errors import BadUpdateError, InvalidFieldError, PathNotAllowedError
from flashrl_wire.layout import PartSpec
from flashrl_wire.messages import Manifest

STATE = "weights.json"
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_MAX_NAME = 64


class UpdateFolder:
    """`root`/flashrl-UID-NAME, mode 0700: whoever can write there is this user."""

    def __init__(self, root: Path, name: str) -> None:
        """InvalidFieldError for a name that is none, ValueError where the folder is open to others."""
        self.path = root / f"flashrl-{os.getuid()}-{_checked(name, 'stage')}"
        make_private(self.path)

    def publish(self, state: Mapping[str, Any]) -> None:
        """Replace `weights.json`, whole or not at all."""
        aside = self.path / f"{STATE}.{os.getpid()}"
        aside.touch(mode=0o600)
        aside.write_text(json.dumps(state))
        aside.replace(self.path / STATE)

    def changes(self, name: str, manifest: Manifest, parts: Mapping[str, PartSpec]) -> Iterator[Change]:
        """The changes in file `name`, once every chunk of it has been verified; indices are checked on the way.

        `manifest` has passed `check_manifest`. PathNotAllowedError for a file that others could have written,
        BadUpdateError for content that is not the manifest's.
        """
        buffer = RawBuffer(manifest.raw_bytes)
        with _opened(self.path / _checked(name, "file"), manifest.wire_bytes) as file:
            _fill(buffer, file, manifest)
        end = 0
        changes = codec.decode(manifest.segments, buffer.bytes, parts)
        for segment, change in zip(manifest.segments, changes, strict=True):
            yield change
            end += codec.segment_bytes(segment)
            buffer.release(end)


def _fill(buffer: RawBuffer, file: BinaryIO, manifest: Manifest) -> None:
    offset = 0
    for number, chunk in enumerate(manifest.chunks):
        try:
            block = codec.decompress(chunk, file.read(chunk.wire_bytes))
        except BadUpdateError as error:
            raise BadUpdateError(f"chunk {number}: {error}") from error
        buffer.write(offset, block)
        offset += len(block)


def _checked(name: str, field: str) -> str:
    if not 0 < len(name) <= _MAX_NAME or not _NAME.issuperset(name) or name.startswith("."):
        raise InvalidFieldError(f"{field}: {name[:_MAX_NAME]!r} is no plain name")
    return name


@contextmanager
def _opened(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PathNotAllowedError(f"file: {path.name} cannot be opened: {error.strerror}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        os.close(descriptor)
        raise PathNotAllowedError(f"file: {path.name} is not a file that only this user can read and write")
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size != num_bytes:
            raise BadUpdateError(f"file: {path.name} has {found.st_size} bytes, the manifest declares {num_bytes}")
        yield file
