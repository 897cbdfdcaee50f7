"""Sampling requests over replicas that say what they are told: who gets them, what is asked again, and what is not."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import pytest
from tests.helpers.scripted_http import HANG_UP, Answer, ScriptedHttp, refusal

from flashrl_trainer.balancer import Balancer
from flashrl_trainer.fleet import Fleet, NeedsSnapshotError
from flashrl_trainer.keeper import Keeper
from flashrl_trainer.publisher import Publisher
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire.errors import InvalidFieldError
from flashrl_wire.messages import GenerateRequest, GenerateResponse, Sampling

WEIGHTS = {
    "version": 3, "digest": "0" * 32, "quantization": "int8", "storage_bytes": 10, "last_update": None,
    "model": "m", "layout_hash": "1" * 32, "tokenizer_hash": "2" * 32, "vocab_size": 9, "max_model_len": 99,
    "weights_port": 5, "run_id": None, "poisoned": False,
}  # fmt: skip
GENERATE = "POST /generate"

Balanced = Callable[..., Balancer]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def services(stack: ExitStack) -> Callable[[int], list[ScriptedHttp]]:
    """Starts replicas that are ready, each with version 3."""

    def start(count: int) -> list[ScriptedHttp]:
        started = [stack.enter_context(ScriptedHttp().serving()) for _ in range(count)]
        for http in started:
            http.on("GET /ready", Answer({"ready": True}))
            http.on("GET /health", Answer({}))
            http.on("GET /weights", Answer(WEIGHTS))
        return started

    return start


@pytest.fixture
def balanced(stack: ExitStack) -> Balanced:
    """Makes a balancer over URLs."""

    def make(urls: Sequence[str], *, deadline_s: float = 10.0, request_timeout_s: float = 10.0) -> Balancer:
        clients = [RolloutClient(url, None, request_timeout_s=request_timeout_s, retry_s=2.0) for url in urls]
        replicas = [Replica(client, Publisher(client, "run", deadline_s=5.0, keys=None)) for client in clients]
        fleet = Fleet(replicas, deadline_s=deadline_s, straggler_s=1.0, note=lambda line: None)
        stack.callback(fleet.stopping.set)
        Keeper(fleet, lambda: list(urls), lambda url: replicas[0]).start()
        return Balancer(fleet, deadline_s=deadline_s)

    return make


def reply(version: int = 3) -> Answer:
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    return Answer({"weight_version": version, "quantization": "int8", "results": [], "usage": usage})


def ask(seed: int = 0, version: int = 0) -> GenerateRequest:
    return GenerateRequest(prompts=["hi"], sampling=Sampling(seed=seed), min_weight_version=version)


def asked(http: ScriptedHttp) -> int:
    return len(http.asked[GENERATE])


def test_requests_run_at_a_time_and_replies_keep_their_order(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced
) -> None:
    (http,) = services(1)
    first = threading.Event()
    http.on(GENERATE, Answer(reply(1).body, when=first), reply(2))
    arrived = []

    def on_done(answer: GenerateResponse) -> None:
        arrived.append(answer.weight_version)
        first.set()  # the first one asked is answered only after the second one has been

    replies = balanced([http.url]).generate([ask(0), ask(1)], on_done)
    assert arrived == [2, 1]
    seeds = [request.body["sampling"]["seed"] for request in http.asked[GENERATE]]
    by_seed = dict(zip(seeds, [1, 2], strict=True))
    assert [answer.weight_version for answer in replies] == [by_seed[0], by_seed[1]]


def test_all_replicas_get_an_equal_share(services: Callable[[int], list[ScriptedHttp]], balanced: Balanced) -> None:
    """None answers before all have been asked, so only a balanced choice gives each of them two."""
    three = services(3)
    everybody = threading.Event()
    for http in three:
        http.on(GENERATE, *[Answer(reply().body, when=everybody) for _ in range(6)])
    balancer = balanced([http.url for http in three])
    while len(balancer._fleet.in_use()) < 3:
        time.sleep(0.01)
    done = threading.Thread(target=balancer.generate, args=([ask(seed) for seed in range(6)],))
    done.start()
    while sum(map(asked, three)) < 6:
        time.sleep(0.01)
    everybody.set()
    done.join()
    assert [asked(http) for http in three] == [2, 2, 2]


@pytest.mark.parametrize(
    "failure", [HANG_UP, refusal(503, "not_ready", "stopping"), refusal(409, "version_not_reached", "has 0")]
)
def test_work_of_a_lost_replica_is_done_by_another(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced, failure: Answer
) -> None:
    lost, other = services(2)
    lost.on(GENERATE, *[failure] * 50)
    other.on(GENERATE, *[reply()] * 50)
    balancer = balanced([lost.url, other.url])
    replies = balancer.generate([ask(seed) for seed in range(8)])
    assert [answer.weight_version for answer in replies] == [3] * 8
    assert asked(lost) == balancer.moved
    assert balancer.moved > 0


def test_work_at_a_replica_that_is_fenced_meanwhile_is_done_by_another(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced
) -> None:
    """It is stopped: it takes requests, and never answers."""
    stopped, other = services(2)
    never = threading.Event()
    stopped.on(GENERATE, *[Answer(when=never, hang_up=True)] * 8)
    other.on(GENERATE, *[reply()] * 8)
    balancer = balanced([stopped.url, other.url])
    fleet = balancer._fleet
    while len(fleet.in_use()) < 2:
        time.sleep(0.01)

    def fence_once_asked() -> None:
        while not asked(stopped):
            time.sleep(0.01)
        stopped.on("GET /ready", refusal(503, "not_ready", "silent"))
        fleet.fence(fleet.replicas[0], "it does not answer")

    threading.Thread(target=fence_once_asked).start()
    assert len(balancer.generate([ask(seed) for seed in range(4)])) == 4
    never.set()


def test_lone_replica_that_comes_back_is_asked_again(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced
) -> None:
    (http,) = services(1)
    http.on(GENERATE, HANG_UP, refusal(503, "not_ready", "starting"), reply(7))
    assert balanced([http.url]).generate([ask()])[0].weight_version == 7
    assert asked(http) == 3


def test_full_queue_is_waited_for(services: Callable[[int], list[ScriptedHttp]], balanced: Balanced) -> None:
    (http,) = services(1)
    http.on(GENERATE, refusal(429, "queue_full", "9 wait", {"Retry-After": "1"}), reply())
    assert balanced([http.url]).generate([ask()])[0].weight_version == 3
    (gap,) = [later.at - earlier.at for earlier, later in pairwise(http.asked[GENERATE])]
    assert gap >= 1.0


def test_wrong_request_is_an_error_at_once(services: Callable[[int], list[ScriptedHttp]], balanced: Balanced) -> None:
    (http,) = services(1)
    http.on(GENERATE, refusal(422, "invalid_field", "prompts.0: is empty"))
    with pytest.raises(InvalidFieldError, match=r"^prompts\.0: is empty$"):
        balanced([http.url]).generate([ask()])
    assert asked(http) == 1


def test_nobody_there_is_waited_for_until_the_deadline_and_named(
    balanced: Balanced, free_port: Callable[[], int]
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(ServiceUnreachableError, match=rf"^rollout service at {url}: ConnectError: "):
        balanced([url], deadline_s=0.5).generate([ask()])
    assert time.monotonic() - began >= 0.5


def test_an_answer_that_takes_too_long_is_not_asked_for_again(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced
) -> None:
    (http,) = services(1)
    never = threading.Event()
    http.on(GENERATE, Answer(when=never, hang_up=True))
    with pytest.raises(ServiceUnreachableError, match=rf"^rollout service at {http.url}: ReadTimeout$"):
        balanced([http.url], request_timeout_s=0.2).generate([ask()])
    never.set()
    assert asked(http) == 1


def test_only_replicas_with_the_wanted_version_are_asked(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced
) -> None:
    old, new = services(2)
    new.on("GET /weights", Answer(WEIGHTS | {"version": 4}))
    new.on(GENERATE, *[reply(4)] * 4)
    balancer = balanced([old.url, new.url])
    assert len(balancer.generate([ask(seed, version=4) for seed in range(4)])) == 4
    assert (asked(old), asked(new)) == (0, 4)


def test_weights_that_nobody_has_are_asked_of_the_trainer(
    services: Callable[[int], list[ScriptedHttp]], balanced: Balanced
) -> None:
    (http,) = services(1)
    http.on("GET /weights", Answer(WEIGHTS | {"poisoned": True}))
    with pytest.raises(NeedsSnapshotError, match=rf"^rollout service at {http.url}: poisoned$"):
        balanced([http.url]).generate([ask()])
