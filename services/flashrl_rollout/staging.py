"""A complete transfer -> a staged file: decoded, every index in range.

Knows codecs and files; knows nothing of sockets or engines. Runs in a thread of its own.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from flashrl_rollout.staged import StagedUpdate, write_staged
from flashrl_rollout.transfer import Transfer
from flashrl_wire import codec
from flashrl_wire.delta import Change
from flashrl_wire.errors import TooLargeError, UnknownTransferError
from flashrl_wire.frames import Failed
from flashrl_wire.layout import PartSpec


def stage(transfer: Transfer, path: Path, parts: Mapping[str, PartSpec]) -> StagedUpdate:
    """Write the transfer's changes to `path` and give its raw memory back on the way.

    BadUpdateError for content that does not fit the manifest, TooLargeError where the disk is full,
    UnknownTransferError once the transfer is aborted.
    """
    try:
        return write_staged(path, _changes(transfer, parts))
    except OSError as error:
        raise TooLargeError(f"cannot stage the update in {path.parent}: {error.strerror}") from error


def _changes(transfer: Transfer, parts: Mapping[str, PartSpec]) -> Iterator[Change]:
    segments, end = transfer.manifest.segments, 0
    changes = codec.decode(segments, transfer.buffer.bytes, parts)
    for segment, change in zip(segments, changes, strict=True):
        if isinstance(transfer.outcome, Failed):
            raise UnknownTransferError(transfer.outcome.message)
        yield change
        end += codec.segment_bytes(segment)
        transfer.buffer.release(end)  # the staged file grows as fast, so that both never exist whole
