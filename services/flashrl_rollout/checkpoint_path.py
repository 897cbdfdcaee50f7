"""Which folders on disk the service may load weights from.

Knows paths and links; knows nothing of what the files contain.
"""

from collections.abc import Sequence
from pathlib import Path

from flashrl_wire.errors import InvalidFieldError, PathNotAllowedError


def resolve_checkpoint(path: str, roots: Sequence[Path]) -> Path:
    """The folder that `path` means after following links.

    PathNotAllowedError where it, or a file in it, lies outside every root; InvalidFieldError where it is no folder.
    """
    try:
        folder = Path(path).resolve()
        _check_inside(folder, roots)
        if not folder.is_dir():
            raise InvalidFieldError(f"path: {path} is not a folder")
        for entry in folder.iterdir():
            _check_inside(entry.resolve(), roots)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a loop of links, a long name, a closed folder
        raise InvalidFieldError(f"path: {error}") from error
    return folder


def _check_inside(path: Path, roots: Sequence[Path]) -> None:
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        raise PathNotAllowedError(f"{path.name} does not lie under a checkpoint root")
