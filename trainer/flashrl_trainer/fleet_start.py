"""Finds a run's replicas and waits until they are ready. Knows the settings; knows nothing of what the run does."""

import time
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path

from flashrl_trainer.discovery import finder
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.interrupt import Interrupt
from flashrl_trainer.jobs import spawn
from flashrl_trainer.keeper import Keeper
from flashrl_trainer.publisher import Publisher, load_curve_keys
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_trainer.settings import TrainerConfig
from flashrl_trainer.token_file import read_token

RETRY_S = 5.0  # for a single call; what takes longer is the keeper's business
_SAY_EVERY_S = 10.0
_POLL_S = 0.2

Say = Callable[[str], None]


def replica_maker(config: TrainerConfig, run_id: str) -> Callable[[str], Replica]:
    """A function that makes the replica at a URL; ValueError for a token or keys that cannot be read."""
    token = read_token(config.rollout)
    keys = load_curve_keys(Path(config.rollout.keys_dir)) if config.rollout.keys_dir else None
    retry_s = min(RETRY_S, config.rollout.connect_deadline_s)

    def make(url: str) -> Replica:
        client = RolloutClient(url, token, request_timeout_s=config.rollout.request_timeout_s, retry_s=retry_s)
        return Replica(client, Publisher(client, run_id, deadline_s=config.sync.transfer_deadline_s, keys=keys))

    return make


def open_fleet(config: TrainerConfig, run_id: str, interrupt: Interrupt, say: Say) -> Fleet:
    """The replicas, looked after from now on; ServiceUnreachableError if none is ready by the deadline.

    With some of them ready by then, the run goes on with those.
    """
    find, make = finder(config.rollout), replica_maker(config, run_id)
    deadline_s = config.rollout.connect_deadline_s
    with interrupt.anywhere():
        urls = _found(find, config.rollout.discover, time.monotonic() + deadline_s)
        fleet = Fleet(map(make, urls), deadline_s=deadline_s, straggler_s=config.sync.straggler_s, note=say)
        _wait_ready(fleet, deadline_s, say)
    Keeper(fleet, find, make).start()
    return fleet


def _found(find: Callable[[], list[str]], name: str, end: float) -> list[str]:
    while not (urls := find()):
        if time.monotonic() >= end:
            raise ServiceUnreachableError(f"rollout.discover: {name} has no address")
        time.sleep(0.5)
    return urls


def _wait_ready(fleet: Fleet, deadline_s: float, say: Say) -> None:
    """All at a time: each has the whole deadline."""
    jobs = [
        spawn(partial(replica.client.wait_ready, deadline_s, _sparingly(replica.url, say)), f"wait for {replica.url}")
        for replica in fleet.replicas
    ]
    while wait(jobs, timeout=_POLL_S).not_done:
        pass  # a signal's handler runs in between
    failures = [error for job in jobs if (error := job.exception()) is not None]
    if len(failures) == len(jobs):
        raise failures[0]
    for failure in failures:
        say(f"going on without one replica: {failure}")


def _sparingly(url: str, say: Say) -> Say:
    said_at = float("-inf")

    def on_wait(state: str) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= _SAY_EVERY_S:
            said_at = time.monotonic()
            say(f"waiting for the rollout service at {url}: {state}")

    return on_wait
