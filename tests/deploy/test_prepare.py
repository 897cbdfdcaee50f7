"""What is looked at before a container starts: settings, folders, keys; each mistake is one line."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import prepare
import pytest

from flashrl_rollout.security import read_keys, read_token

ROOT = Path(__file__).resolve().parents[2]
DEFAULT: Mapping[str, str] = {
    "FLASHRL_RECIPE": "configs/tiny_arith.toml",
    "FLASHRL_ROLLOUT_MODEL": "examples/tiny_arith/model",
    "FLASHRL_ROLLOUT_QUANTIZATION": "int8",
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_default_is_fine() -> None:
    prepare.check_settings(DEFAULT)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"FLASHRL_RECIPE": "configs/none.toml"},
            "FLASHRL_RECIPE: the image has no configs/none.toml; it has configs/",
        ),
        ({"FLASHRL_ROLLOUT_QUANTIZATION": "int9"}, "quantization: .*'int9' .from FLASHRL_ROLLOUT_QUANTIZATION"),
        ({"FLASHRL_ROLLOUT_MAX_MODEL_LEN": "long"}, "max_model_len: .*'long' .from FLASHRL_ROLLOUT_MAX_MODEL_LEN"),
        (
            {"FLASHRL_ROLLOUT_QUANTIZATION": "fp8"},
            "FLASHRL_ROLLOUT_QUANTIZATION: is fp8, but FLASHRL_RECIPE=.* is for int8",
        ),
        (
            {"FLASHRL_ROLLOUT_MODEL": "M"},
            "FLASHRL_ROLLOUT_MODEL: is M, but FLASHRL_RECIPE=.* is for examples/tiny_arith",
        ),
        ({"FLASHRL_ROLLOUT_MAX_LEN": "3"}, "max_len: unknown setting"),
    ],
)
def test_a_wrong_setting_is_named(changed: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        prepare.check_settings({**DEFAULT, **changed})


@pytest.mark.parametrize("value", ["", "0", "me", "-1", "1.5"])
def test_a_user_is_a_number_and_not_root(value: str) -> None:
    with pytest.raises(ValueError, match=r"^FLASHRL_UID: must be the number of a user"):
        prepare.number({"FLASHRL_UID": value}, "FLASHRL_UID")


def test_a_folder_that_the_user_cannot_write_is_named_with_its_owner(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    mine, group = os.getuid(), os.getgid()
    prepare.check_runs(tmp_path, mine, group, 0)
    with pytest.raises(ValueError, match=rf"belongs to user {mine} and cannot be written by user {mine + 1}"):
        prepare.check_runs(tmp_path, mine + 1, group + 1, 0)
    tmp_path.chmod(0o770)
    prepare.check_runs(tmp_path, mine + 1, group, 0)
    tmp_path.chmod(0o777)
    prepare.check_runs(tmp_path, mine + 1, group + 1, 0)


def test_a_full_disk_is_named_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has .* GiB of free space, 1e\+09 are needed: make room"):
        prepare.check_runs(tmp_path, os.getuid(), os.getgid(), 1e9)


def test_keys_are_made_once_for_both_sides_and_only_for_their_user(tmp_path: Path) -> None:
    for side in prepare.SIDES:
        (tmp_path / side).mkdir()
    assert not prepare.has_keys(tmp_path)
    prepare.make_keys(tmp_path, os.getuid(), os.getgid())
    assert prepare.has_keys(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files) == [
        *("service/allowed/trainer.key", "service/server.key", "service/server.key_secret", "service/token"),
        *("trainer/server.key", "trainer/token", "trainer/trainer.key", "trainer/trainer.key_secret"),
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_rotated_keys_replace_all_of_the_old_ones(tmp_path: Path) -> None:
    for side in prepare.SIDES:
        (tmp_path / side).mkdir()
    prepare.make_keys(tmp_path, os.getuid(), os.getgid())
    allowed = tmp_path / "service" / "allowed"
    (allowed / "former.key").write_bytes((allowed / "trainer.key").read_bytes())
    old_keys, old_token = read_keys(tmp_path / "service"), read_token(tmp_path / "service" / "token", {})
    prepare.make_keys(tmp_path, os.getuid(), os.getgid())
    assert read_keys(tmp_path / "service").public != old_keys.public
    assert read_token(tmp_path / "trainer" / "token", {}) != old_token
    assert [path.name for path in allowed.iterdir()] == ["trainer.key"]
    assert prepare.has_keys(tmp_path)


def test_a_volume_that_was_lost_means_new_keys(tmp_path: Path) -> None:
    for side in prepare.SIDES:
        (tmp_path / side).mkdir()
    prepare.make_keys(tmp_path, os.getuid(), os.getgid())
    (tmp_path / "trainer" / "token").write_text("another\n")
    assert not prepare.has_keys(tmp_path)
