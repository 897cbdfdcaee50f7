"""The client's single calls against a server that says what it is told: what is tried again, and how failures read."""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from tests.helpers.scripted_http import HANG_UP, Answer, ScriptedHttp, refusal

from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire.errors import InvalidFieldError, NotReadyError, UpdateInProgressError

WEIGHTS = {
    "version": 3, "digest": "0" * 32, "quantization": "int8", "storage_bytes": 10, "last_update": None,
    "model": "m", "layout_hash": "1" * 32, "tokenizer_hash": "2" * 32, "vocab_size": 9, "max_model_len": 99,
    "weights_port": 5, "run_id": None, "poisoned": False,
}  # fmt: skip
WEIGHTS_ROUTE = "GET /weights"


@pytest.fixture
def http() -> Iterator[ScriptedHttp]:
    with ScriptedHttp().serving() as http:
        yield http


def client(url: str, *, retry_s: float = 5.0, token: str | None = None) -> RolloutClient:
    return RolloutClient(url, token, request_timeout_s=5.0, retry_s=retry_s)


def gaps(http: ScriptedHttp, route: str) -> list[float]:
    times = [asked.at for asked in http.asked[route]]
    return [later - earlier for earlier, later in pairwise(times)]


def test_full_queue_is_tried_again_when_it_says(http: ScriptedHttp) -> None:
    http.on(WEIGHTS_ROUTE, refusal(429, "queue_full", "9 wait", {"Retry-After": "1"}), Answer(WEIGHTS))
    assert client(http.url).weights().version == 3
    (gap,) = gaps(http, WEIGHTS_ROUTE)
    assert 1.0 <= gap < 2.0


@pytest.mark.parametrize(
    "failure", [HANG_UP, refusal(503, "not_ready", "starting"), refusal(409, "update_in_progress", "another")]
)
def test_what_passes_is_tried_again(http: ScriptedHttp, failure: Answer) -> None:
    http.on(WEIGHTS_ROUTE, failure, Answer(WEIGHTS))
    assert client(http.url).weights().version == 3
    assert len(http.asked[WEIGHTS_ROUTE]) == 2


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (refusal(422, "invalid_field", "prompts.0: is empty"), InvalidFieldError, "prompts.0: is empty"),
        (refusal(409, "update_in_progress", "follows run a", run_id="a"), UpdateInProgressError, "follows run a"),
        (refusal(409, "update_in_progress", "busy", transfer_id="t"), UpdateInProgressError, "busy"),
        (refusal(503, "not_ready", "poisoned: x", poisoned=True), NotReadyError, "poisoned: x"),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(
    http: ScriptedHttp, failure: Answer, kind: type[Exception], message: str
) -> None:
    http.on(WEIGHTS_ROUTE, failure)
    with pytest.raises(kind, match=f"^{message}$"):
        client(http.url).weights()
    assert len(http.asked[WEIGHTS_ROUTE]) == 1


def test_nobody_there_is_tried_until_the_deadline_and_named(free_port: Callable[[], int]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(ServiceUnreachableError, match=rf"^rollout service at {url}: ConnectError: "):
        client(url, retry_s=0.5).weights()
    assert time.monotonic() - began >= 0.5


def test_deadline_counts_from_the_first_failure(http: ScriptedHttp) -> None:
    """A service is lost at the end of a request that took longer than the deadline; it is worth waiting for."""
    slow = threading.Event()
    http.on(WEIGHTS_ROUTE, Answer(when=slow, hang_up=True), Answer(WEIGHTS))
    threading.Timer(0.6, slow.set).start()
    assert client(http.url, retry_s=0.5).weights().version == 3


@pytest.mark.parametrize("body", [b"<html>hello</html>", {"version": 3}, WEIGHTS | {"version": "new"}])
def test_another_kind_of_server_is_one_line(http: ScriptedHttp, body: object) -> None:
    http.on(WEIGHTS_ROUTE, Answer(body))
    with pytest.raises(ServiceUnreachableError, match=rf"^{http.url} answers, but not as a rollout service[^\n]*$"):
        client(http.url).weights()
    assert len(http.asked[WEIGHTS_ROUTE]) == 1


def test_facts_that_a_newer_service_adds_are_passed_over(http: ScriptedHttp) -> None:
    http.on(WEIGHTS_ROUTE, Answer(WEIGHTS | {"more": 1}))
    assert client(http.url).weights().version == WEIGHTS["version"]


def test_token_is_sent_with_every_request(http: ScriptedHttp) -> None:
    http.on(WEIGHTS_ROUTE, Answer(WEIGHTS))
    own = client(http.url, token="secret")
    own.weights()
    assert [asked.headers["Authorization"] for asked in http.asked[WEIGHTS_ROUTE]] == ["Bearer secret"]
    assert own.session(1).headers["Authorization"] == "Bearer secret"


def test_waits_until_ready(http: ScriptedHttp) -> None:
    http.on("GET /ready", refusal(503, "not_ready", "starting: loading"), Answer({"ready": True}))
    states: list[str] = []
    client(http.url).wait_ready(10.0, states.append)
    assert states == ["starting: loading"]


def test_poisoned_is_ready_for_the_update_that_heals_it(http: ScriptedHttp) -> None:
    http.on("GET /ready", refusal(503, "not_ready", "poisoned", poisoned=True))
    client(http.url).wait_ready(0.0, lambda state: pytest.fail(state))


def test_does_not_wait_for_what_waiting_does_not_change(http: ScriptedHttp) -> None:
    http.on("GET /ready", refusal(401, "unauthorized", "no valid token"))
    with pytest.raises(ServiceUnreachableError, match=rf"^rollout service at {http.url}: no valid token$"):
        client(http.url).wait_ready(60.0, lambda state: pytest.fail(state))


def test_not_ready_in_time_says_why(http: ScriptedHttp) -> None:
    http.on("GET /ready", refusal(503, "not_ready", "starting: loading"))
    with pytest.raises(
        ServiceUnreachableError, match=rf"^rollout service at {http.url} not ready after 0 s: starting: l"
    ):
        client(http.url).wait_ready(0.0, lambda state: pytest.fail(state))


@pytest.mark.parametrize("answer", [HANG_UP, refusal(500, "error", "x"), Answer({"run_id": None})])
def test_release_never_fails(http: ScriptedHttp, answer: Answer) -> None:
    http.on("DELETE /runs/mine", answer)
    client(http.url, retry_s=60.0).release("mine")
    assert len(http.asked["DELETE /runs/mine"]) == 1
