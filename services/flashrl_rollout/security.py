"""Who may talk to the service: the API token, the CURVE keys and the rule for addresses beyond this machine.

Knows files and bytes; knows nothing of HTTP routes or sockets.
"""

import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq.auth

TOKEN_VARIABLE = "FLASHRL_TOKEN"
_SERVER, _TRAINER, _TOKEN, _ALLOWED = "server", "trainer", "token", "allowed"


@dataclass(frozen=True, repr=False)
class ServiceKeys:
    """The service's CURVE pair (Z85) and the folder of public keys that may connect."""

    public: bytes
    secret: bytes
    allowed_dir: Path


def is_authorized(header: bytes | None, token: str) -> bool:
    """Whether an Authorization header carries the token; in a time that does not depend on where it differs."""
    return hmac.compare_digest(header or b"", b"Bearer " + token.encode())


def read_token(token_file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The API token of FLASHRL_TOKEN or else of a file; ValueError for an empty one or a file that others may read."""
    token = environ.get(TOKEN_VARIABLE)
    name = TOKEN_VARIABLE
    if token is None and token_file is not None:
        token, name = _read_private(token_file, "token_file").strip(), f"token_file: {token_file}"
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise ValueError(f"{name}: is empty or has characters that no HTTP header can carry")
    return token


def read_keys(keys_dir: Path) -> ServiceKeys:
    """The key pair and allow-list that `write_keys` wrote; ValueError names the file that is missing or too open."""
    secret_file = keys_dir / f"{_SERVER}.key_secret"
    _read_private(secret_file, "keys_dir")
    public, secret = _load(secret_file)
    allowed = keys_dir / _ALLOWED
    if secret is None or not allowed.is_dir():
        raise ValueError(f"keys_dir: {keys_dir} has no secret key or no folder {_ALLOWED}")
    if not any(allowed.glob("*.key")):
        raise ValueError(f"keys_dir: {allowed} holds no public key, so that no trainer could connect")
    for file in allowed.glob("*.key"):
        _load(file)
    for path in (allowed, *allowed.glob("*.key")):
        if path.stat().st_mode & 0o022:  # whoever writes here decides who may connect
            raise ValueError(f"keys_dir: {path} can be written by other users; chmod go-w it")
    return ServiceKeys(public, secret, allowed)


def _load(file: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"keys_dir: {file}: {error}") from error


def _read_private(file: Path, setting: str) -> str:
    try:
        loose = file.stat().st_mode & 0o077
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if loose:
        raise ValueError(f"{setting}: {file} is open to other users; chmod 600 it")
    return text


def write_keys(folder: Path) -> None:
    """Write `folder`/service and `folder`/trainer: key pairs, the allow-list and one token for both.

    Files get mode 0600 and folders 0700. FileExistsError where a folder is already there: keys are never replaced.
    """
    service, trainer = folder / "service", folder / _TRAINER
    old_umask = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (service, trainer, service / _ALLOWED):
            path.mkdir()
        server_public, _ = zmq.auth.create_certificates(service, _SERVER)
        trainer_public, _ = zmq.auth.create_certificates(trainer, _TRAINER)
        _copy(Path(server_public), trainer)
        _copy(Path(trainer_public), service / _ALLOWED)
        token = secrets.token_urlsafe(32)
        for path in (service, trainer):
            (path / _TOKEN).write_text(token + "\n")
    finally:
        os.umask(old_umask)


def _copy(file: Path, folder: Path) -> None:
    (folder / file.name).write_bytes(file.read_bytes())


def is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own; ValueError for a name that has none."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError as error:
        raise ValueError(f"host: {host} has no address ({error.strerror})") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


def check_exposure(host: str, token: str | None, keys: ServiceKeys | None) -> None:
    """ValueError where a service beyond loopback would lack its token or its keys."""
    missing = [name for name, value in (("a token (token_file)", token), ("CURVE keys (keys_dir)", keys)) if not value]
    if missing and not is_loopback(host):
        raise ValueError(
            f"host: {host} is reachable from other machines, which needs {' and '.join(missing)}; "
            "`flashrl-rollout keys DIR` makes both"
        )
