"""What `flashrl-rollout keys` writes is what the trainer reads. Knows both sides' files and no socket."""

from pathlib import Path

import pytest
import zmq.auth

from flashrl_rollout.security import read_keys, read_token, write_keys
from flashrl_trainer import token_file
from flashrl_trainer.publisher import load_curve_keys
from flashrl_trainer.settings import RolloutSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_keys(tmp_path / "deploy")
    return tmp_path / "deploy"


def test_the_trainer_reads_what_the_service_wrote(folder: Path) -> None:
    ours, theirs = load_curve_keys(folder / "trainer"), read_keys(folder / "service")
    assert ours.server == theirs.public
    (allowed,) = theirs.allowed_dir.glob("*.key")
    assert zmq.auth.load_certificate(allowed)[0] == ours.public
    assert ours.secret not in (theirs.secret, ours.public)


def test_another_folder_than_the_trainers_is_named(folder: Path) -> None:
    for wrong in (folder, folder / "service"):
        with pytest.raises(ValueError, match=r"rollout\.keys_dir: no file .*trainer\.key_secret.*flashrl-rollout keys"):
            load_curve_keys(wrong)


def test_a_secret_that_others_may_read_is_refused(folder: Path) -> None:
    (folder / "trainer" / "trainer.key_secret").chmod(0o640)
    with pytest.raises(ValueError, match=r"rollout\.keys_dir: .*trainer\.key_secret is readable by others"):
        load_curve_keys(folder / "trainer")


def test_the_trainer_reads_the_token_that_the_service_wrote_unless_others_may(folder: Path) -> None:
    settings = RolloutSettings(token_file=str(folder / "trainer" / "token"))
    ours, theirs = token_file.read_token(settings), read_token(folder / "service" / "token", {})
    assert ours == theirs is not None
    (folder / "trainer" / "token").chmod(0o604)
    with pytest.raises(ValueError, match=r"rollout\.token_file: .*token is readable by others; run chmod 600 on it"):
        token_file.read_token(settings)


@pytest.mark.parametrize("name", ["trainer.key_secret", "server.key"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    (folder / "trainer" / name).write_text("no key")
    with pytest.raises(ValueError, match=rf"rollout\.keys_dir: .*{name}"):
        load_curve_keys(folder / "trainer")


def test_a_public_key_in_place_of_the_secret_one_is_refused(folder: Path) -> None:
    public, secret = folder / "trainer" / "trainer.key", folder / "trainer" / "trainer.key_secret"
    secret.write_bytes(public.read_bytes())
    with pytest.raises(ValueError, match=r"rollout\.keys_dir: .*holds no secret key"):
        load_curve_keys(folder / "trainer")
