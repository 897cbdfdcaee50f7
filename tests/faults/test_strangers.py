"""Clients without the right secrets, against a service process: refused, said once in its log, and nothing changes."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import zmq
import zmq.auth
from tests.faults import served
from tests.helpers.forked import LIMIT_S, ServiceProgram, free_ports
from tests.helpers.outgoing import outgoing

from flashrl_rollout.security import write_keys
from flashrl_trainer.publisher import CurveKeys, Publisher, load_curve_keys
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire.errors import UnauthorizedError

ROUTES = [
    ("POST", "/load_weights"), ("POST", "/load_weights/x/commit"), ("DELETE", "/load_weights/x"), ("GET", "/weights"),
    ("GET", "/weights/layout"), ("POST", "/generate"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/metrics"),
    ("GET", "/status"), ("GET", "/ready"), ("DELETE", "/runs/run-a"), ("GET", "/nowhere"),
]  # fmt: skip


class Guarded:
    """A service with token and keys, as `flashrl-rollout keys` makes them."""

    def __init__(self, folder: Path) -> None:
        write_keys(folder / "keys")
        service, self.trainer_dir = folder / "keys" / "service", folder / "keys" / "trainer"
        self.token = (self.trainer_dir / "token").read_text().strip()
        settings = {"keys_dir": service, "token_file": service / "token", "transfer_deadline_s": 1.0}
        self.service = ServiceProgram(folder / "service", free_ports(2), settings=settings)
        self.service.give_token(self.token)
        while not self.service.is_ready:
            assert not self.service.ends_within(0.01), self.service.errors
        self.stored = served.first()

    @property
    def keys(self) -> CurveKeys:
        """The trainer's own."""
        return load_curve_keys(self.trainer_dir)

    def publish(self, keys: CurveKeys | None, *, token: str | None = None, deadline_s: float = LIMIT_S) -> None:
        """The next version."""
        client = RolloutClient(self.service.url, token or self.token, request_timeout_s=LIMIT_S, retry_s=0)
        update = self.stored.delta_to(self.stored.moved())
        Publisher(client, served.RUN, deadline_s=deadline_s, keys=keys).publish(outgoing(update))

    def assert_untouched(self) -> None:
        """It serves what it did, and takes an update from who may bring one."""
        served.assert_serves(self.service, self.stored)
        self.publish(self.keys)
        self.stored = self.stored.moved()
        served.assert_serves(self.service, self.stored)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("guarded"))
    yield guarded
    guarded.service.kill()


def stranger(guarded: Guarded) -> CurveKeys:
    """A key of its own that is on no list."""
    public, secret = zmq.curve_keypair()
    return CurveKeys(public, secret, guarded.keys.server)


def fooled(guarded: Guarded) -> CurveKeys:
    """The trainer's key, but another service's public one."""
    keys = guarded.keys
    return CurveKeys(keys.public, keys.secret, zmq.curve_keypair()[0])


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("no key", "no key, one made for another service"),
        ("unlisted key", "its key is not in the allow-list"),
        ("wrong server key", "no key, one made for another service"),
    ],
)
def test_no_chunk_comes_from(kind: str, line: str, guarded: Guarded) -> None:
    keys = {"no key": None, "unlisted key": stranger(guarded), "wrong server key": fooled(guarded)}[kind]
    with pytest.raises(ServiceUnreachableError, match="did not get on"):
        guarded.publish(keys, deadline_s=0.5)
    assert guarded.service.errors.count(f"refused a weights connection: {line}") == 1
    guarded.assert_untouched()
    with pytest.raises(ServiceUnreachableError):
        guarded.publish(keys, deadline_s=0.5)
    assert guarded.service.errors.count(f"refused a weights connection: {line}") == 1, "once, however often it tries"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic {token}", "bearer {token}", "{token}"])
def test_nothing_is_said_or_done_without_the_token(header: str | None, guarded: Guarded) -> None:
    headers = {} if header is None else {"Authorization": header.format(token=guarded.token)}
    with httpx.Client(base_url=guarded.service.url, headers=headers, timeout=LIMIT_S) as http:
        for method, path in ROUTES:
            reply = http.request(method, path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthorized"), path
        assert http.get("/health").status_code == 200
    assert guarded.service.errors.count("refused an HTTP request: no valid token") == 1
    guarded.assert_untouched()


def test_trainer_with_a_wrong_token_is_told_so(guarded: Guarded) -> None:
    with pytest.raises(UnauthorizedError):
        guarded.publish(guarded.keys, token="wrong")
    guarded.assert_untouched()
