"""Tokens, key files and the rule for addresses beyond this machine; CURVE over real sockets."""

import os
import stat
from pathlib import Path

import pytest
import zmq
import zmq.auth
from tests.helpers.rig import running
from tests.helpers.wire_trainer import Wire

from flashrl_rollout import startup
from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.security import (
    ServiceKeys,
    check_exposure,
    is_authorized,
    is_loopback,
    read_keys,
    read_token,
    write_keys,
)
from flashrl_wire.frames import Failed, Hello


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    write_keys(tmp_path / "keys")
    return tmp_path / "keys"


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer ", b"Bearer abd", b"bearer abc", b"abc", b"Bearer abcd"]
)
def test_wrong_headers_are_refused(header: bytes | None) -> None:
    assert not is_authorized(header, "abc")


def test_right_header_is_accepted() -> None:
    assert is_authorized(b"Bearer abc", "abc")


def test_token_comes_from_the_variable_before_the_file(tmp_path: Path) -> None:
    file = private(tmp_path / "token", "from-file\n")
    assert read_token(file, {}) == "from-file"
    assert read_token(file, {"FLASHRL_TOKEN": "from-variable"}) == "from-variable"
    assert read_token(None, {}) is None


@pytest.mark.parametrize("text", ["", "  \n", "caf\u00e9", "two\nlines"])
def test_token_that_no_header_can_carry(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="token_file"):
        read_token(private(tmp_path / "token", text), {})
    with pytest.raises(ValueError, match="FLASHRL_TOKEN"):
        read_token(None, {"FLASHRL_TOKEN": text})


def test_token_file_must_exist_and_be_private(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token_file: cannot read .*No such file"):
        read_token(tmp_path / "none", {})
    file = private(tmp_path / "token", "x")
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_token(file, {})


def test_written_keys_are_private_and_fit_each_other(keys: Path) -> None:
    for path in keys.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    found = read_keys(keys / "service")
    assert zmq.auth.load_certificate(keys / "trainer" / "server.key")[0] == found.public
    trainer = zmq.auth.load_certificate(keys / "trainer" / "trainer.key_secret")[0]
    assert zmq.auth.load_certificate(found.allowed_dir / "trainer.key")[0] == trainer
    assert (keys / "service" / "token").read_text() == (keys / "trainer" / "token").read_text()
    assert len((keys / "service" / "token").read_text().strip()) >= 40
    assert not list((keys / "trainer").glob("server.key_secret"))
    assert "secret" not in repr(found)


def test_keys_are_never_replaced(keys: Path) -> None:
    before = (keys / "service" / "server.key_secret").read_bytes()
    with pytest.raises(FileExistsError):
        write_keys(keys)
    assert (keys / "service" / "server.key_secret").read_bytes() == before


def test_umask_is_restored(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_keys(tmp_path / "keys")
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_loose_missing_and_broken_keys_are_named(keys: Path, tmp_path: Path) -> None:
    secret = keys / "service" / "server.key_secret"
    secret.chmod(0o644)
    with pytest.raises(ValueError, match=r"keys_dir: .*server.key_secret is open to other users"):
        read_keys(keys / "service")
    private(secret, "no key")
    with pytest.raises(ValueError, match="keys_dir"):
        read_keys(keys / "service")
    with pytest.raises(ValueError, match="keys_dir: cannot read"):
        read_keys(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "trainer.key"])
def test_allow_list_that_others_may_write_is_refused(keys: Path, name: str) -> None:
    path = keys / "service" / "allowed" / name
    path.chmod(0o755 if path.is_dir() else 0o644)
    read_keys(keys / "service")
    path.chmod(0o775 if path.is_dir() else 0o664)
    with pytest.raises(ValueError, match=r"keys_dir: .*allowed.* can be written by other users; chmod go-w it"):
        read_keys(keys / "service")


def test_allow_list_must_not_be_empty(keys: Path) -> None:
    (keys / "service" / "allowed" / "trainer.key").unlink()
    with pytest.raises(ValueError, match="no trainer could connect"):
        read_keys(keys / "service")


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("localhost", True), ("127.8.8.8", True),
                                                ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
                                                ("", False)])  # fmt: skip
def test_which_addresses_are_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_beyond_loopback_both_are_needed(keys: Path) -> None:
    found = read_keys(keys / "service")
    check_exposure("127.0.0.1", None, None)
    check_exposure("0.0.0.0", "token", found)
    for token, given, missing in (
        (None, None, "a token .* and CURVE keys"),
        ("t", None, "CURVE"),
        (None, found, "token"),
    ):
        with pytest.raises(ValueError, match=f"host: 0.0.0.0 .*{missing}"):
            check_exposure("0.0.0.0", token, given)


def test_service_does_not_bind_beyond_loopback_without_them(tmp_path: Path) -> None:
    config = RolloutConfig(model="m", host="0.0.0.0", port=0, weights_port=0, stage_root=tmp_path)
    with pytest.raises(ValueError, match=r"host: 0\.0\.0\.0"):
        startup.bind(config, {"FLASHRL_TOKEN": "t"})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def silent(wire: Wire) -> bool:
    """Whether a Hello gets no answer: the handshake was refused."""
    await wire.send(Hello("x"))
    try:
        await wire.receive(0.5)
    except TimeoutError:
        return True
    finally:
        wire.close()
    return False


def stranger() -> ServiceKeys:
    public, secret = zmq.curve_keypair()
    return ServiceKeys(public, secret, Path())


@pytest.mark.anyio
async def test_only_keys_of_the_allow_list_get_in(tmp_path: Path, keys: Path) -> None:
    server = read_keys(keys / "service").public
    public, secret = zmq.auth.load_certificate(keys / "trainer" / "trainer.key_secret")
    assert secret is not None
    trainer = ServiceKeys(public, secret, Path())
    async with running(tmp_path, keys_dir=keys / "service") as rig:
        assert await silent(Wire(rig.port))  # no key
        assert await silent(Wire(rig.port, stranger(), server))  # a key that is on no list
        assert await silent(Wire(rig.port, trainer, zmq.curve_keypair()[0]))  # another server's key
        welcome = Wire(rig.port, trainer, server)
        await welcome.send(Hello("x"))
        assert await welcome.receive() == Failed("x", "unknown_transfer", "no such transfer")
        welcome.close()


@pytest.mark.anyio
async def test_update_over_curve(tmp_path: Path, keys: Path) -> None:
    public, secret = zmq.auth.load_certificate(keys / "trainer" / "trainer.key_secret")
    assert secret is not None
    server = zmq.auth.load_certificate(keys / "trainer" / "server.key")[0]
    async with running(tmp_path, keys_dir=keys / "service") as rig:
        rig.trainer.wire.close()
        rig.trainer.wire = Wire(rig.port, ServiceKeys(public, secret, Path()), server)
        assert (await rig.trainer.publish(rig.delta())).status_code == 200
        rig.trainer.wire.close()
