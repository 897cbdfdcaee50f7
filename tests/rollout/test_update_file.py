"""Updates by file name: what is accepted, and what somebody else could have put there."""

import json
import os
from pathlib import Path

import pytest
from tests.helpers.rig import LAYOUT
from tests.helpers.wire_trainer import Update, delta_update

from flashrl_rollout import stored_state
from flashrl_rollout.stored_state import Parts
from flashrl_rollout.update_file import UpdateFolder
from flashrl_wire import delta
from flashrl_wire.errors import BadUpdateError, InvalidFieldError, PathNotAllowedError, WireError

OLD, NEW = stored_state.random_parts(LAYOUT, 0), stored_state.random_parts(LAYOUT, 1)
PARTS = {part.name: part for part in LAYOUT.parts()}


@pytest.fixture
def folder(tmp_path: Path) -> UpdateFolder:
    return UpdateFolder(tmp_path, "run")


@pytest.fixture
def update() -> Update:
    return delta_update(LAYOUT, OLD, NEW)


def put(folder: UpdateFolder, update: Update, name: str = "1.update", mode: int = 0o600) -> Path:
    file = folder.path / name
    file.write_bytes(b"".join(update.payloads))
    file.chmod(mode)
    return file


def applied(folder: UpdateFolder, update: Update, name: str = "1.update") -> Parts:
    state = {part: values.clone() for part, values in OLD.items()}
    for change in folder.changes(name, update.manifest, PARTS):
        delta.write(change, state[change.part].reshape(-1))
    return state


def refused(folder: UpdateFolder, update: Update, error: type[WireError], message: str, name: str = "1.update") -> None:
    with pytest.raises(error, match=message):
        next(folder.changes(name, update.manifest, PARTS))


def test_a_whole_file_leads_to_the_new_state(folder: UpdateFolder, update: Update) -> None:
    put(folder, update)
    assert stored_state.digests(applied(folder, update)) == stored_state.digests(NEW)


@pytest.mark.parametrize("name", ["", "../1.update", "/etc/passwd", ".hidden", "a/b", "a\0b", "x" * 65])
def test_a_name_cannot_lead_out_of_the_folder(folder: UpdateFolder, update: Update, name: str) -> None:
    refused(folder, update, InvalidFieldError, "file: .* is no plain name", name)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_touch_is_refused(folder: UpdateFolder, update: Update, mode: int) -> None:
    put(folder, update, mode=mode)
    refused(folder, update, PathNotAllowedError, "only this user can read and write")


def test_links_and_folders_are_refused(folder: UpdateFolder, update: Update, tmp_path: Path) -> None:
    put(folder, update).rename(tmp_path / "elsewhere")
    (folder.path / "1.update").symlink_to(tmp_path / "elsewhere")
    refused(folder, update, PathNotAllowedError, "cannot be opened")
    (folder.path / "sub").mkdir(mode=0o700)
    refused(folder, update, PathNotAllowedError, "not a file", "sub")
    refused(folder, update, PathNotAllowedError, "No such file", "gone")


def test_damaged_and_truncated_files_are_refused_before_the_first_change(folder: UpdateFolder, update: Update) -> None:
    file = put(folder, update)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(folder, update, BadUpdateError, f"chunk {len(update.payloads) - 1}: chunk hash differs")
    file.write_bytes(content[:-1])
    refused(folder, update, BadUpdateError, "the manifest declares")


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_the_folders_own_name_is_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidFieldError, match="stage: "):
        UpdateFolder(tmp_path, name)


def test_a_folder_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"flashrl-{os.getuid()}-run").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="belongs to another user or is open to others"):
        UpdateFolder(tmp_path, "run")


def test_the_state_is_replaced_whole_and_private(folder: UpdateFolder) -> None:
    folder.publish({"version": 1})
    folder.publish({"version": 2})
    (file,) = folder.path.iterdir()
    assert (file.name, json.loads(file.read_text())) == ("weights.json", {"version": 2})
    assert file.stat().st_mode & 0o777 == 0o600
