"""What is checked and bound before the model is loaded, so that a mistake shows at once and not a minute later.

Knows addresses, files and keys; knows nothing of engines or routes.
"""

import os
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.receiver import BindError, Receiver
from flashrl_rollout.security import check_exposure, read_keys, read_token
from flashrl_rollout.stage_dir import StageDir

_BACKLOG = 2048
_OPEN_FILES = 65536


@dataclass(frozen=True)
class Bound:
    """The service's addresses, taken."""

    http: socket.socket
    receiver: Receiver
    stage_dir: StageDir
    token: str | None

    @property
    def http_port(self) -> int:
        """The port that was taken."""
        return int(self.http.getsockname()[1])

    def close(self) -> None:
        """Give everything back."""
        self.http.close()
        self.receiver.stop()
        self.stage_dir.close()


def bind(config: RolloutConfig, environ: Mapping[str, str] = os.environ) -> Bound:
    """Read the secrets and take both ports; ValueError names the setting that stands in the way."""
    _allow_many_connections()
    token = read_token(config.token_file, environ)
    keys = read_keys(config.keys_dir) if config.keys_dir else None
    check_exposure(config.host, token, keys)
    http = _listen(config.host, config.port)
    try:
        receiver = Receiver(str(http.getsockname()[0]), config.weights_port, keys)
    except BindError as error:
        http.close()
        raise ValueError(f"weights_port: cannot listen on {config.host}:{config.weights_port}: {error}") from error
    try:
        stage_dir = StageDir(config.stage_root, receiver.port)
    except ValueError:
        http.close()
        receiver.stop()
        raise
    return Bound(http, receiver, stage_dir, token)


def _allow_many_connections() -> None:
    """Raise the soft limit of open files, often 1024, towards the hard one: every connection is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"host: {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(f"port: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
