"""Fifty updates to three service processes: one is killed and restarted, one stands still, one joins late.

Real processes and signals; the engines compute no model, and hold the real weights of the tiny one.
"""

import resource
import signal
import threading
import time

from tests.helpers.forked import free_ports
from tests.helpers.sync_rig import Fleets, load, train
from tests.helpers.workshop import MODEL, Workshop
from transformers import AutoConfig, AutoTokenizer

from flashrl_trainer.distributed import Ranks
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.weight_sync import Identity, WeightSync
from flashrl_wire.handshake import tokenizer_hash

UPDATES, STRAGGLER_S, LIMIT_S = 50, 1.0, 60.0
KILLED_AT, STOPPED_AT, JOINED_AT, CONTINUED_AT = 5, 10, 20, 40


def identity() -> Identity:
    vocab = AutoTokenizer.from_pretrained(MODEL).get_vocab()
    return Identity("int8", tokenizer_hash(vocab), AutoConfig.from_pretrained(MODEL).vocab_size)


def until_all_in_use(fleet: Fleet, count: int) -> None:
    end = time.monotonic() + LIMIT_S
    while len(fleet.in_use()) < count or len(fleet.replicas) > count:
        assert time.monotonic() < end, fleet.describe()
        time.sleep(0.05)


def rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_three_replicas_end_bit_identical(workshop: Workshop, fleets: Fleets, ranks: Ranks) -> None:
    ports = free_ports(2)
    killed, stopped = workshop.service(ports), workshop.service()
    killed.until_ready()
    stopped.until_ready()
    known = [killed.url, stopped.url]
    fleet = fleets.of(known, straggler_s=STRAGGLER_S, deadline_s=LIMIT_S)
    policy = load(MODEL, ranks)
    sync = WeightSync(fleet, "run-a", ranks, block_bytes=1 << 20, ring_bytes=64 << 20)
    sync.connect(policy, identity(), 0, fresh=True)
    waited: list[float] = []
    before = 0.0
    for step in range(1, UPDATES + 1):
        if step == KILLED_AT:
            killed.kill()
            killed = workshop.service(ports)
        elif step == STOPPED_AT:
            stopped.signal(signal.SIGSTOP)
            before = rss_mib()
        elif step == JOINED_AT:
            late = workshop.service()
            known.append(late.url)
        elif step == CONTINUED_AT:
            stopped.signal(signal.SIGCONT)
        train(policy, step, share=0.001)
        waited.append(sync.push(policy)["sync/seconds"])
    until_all_in_use(fleet, 3)
    held = [service.weights() for service in (killed, stopped, late)]
    assert [(weights["version"], weights["digest"]) for weights in held] == [(UPDATES, sync.digest)] * 3
    assert max(waited) < LIMIT_S, "nobody waits for a process that stands still"
    assert rss_mib() - before < 200
    lost = [line for line in fleets.said if "gets no prompts" in line]
    assert {killed.url, stopped.url} <= {line.split()[0] for line in lost}


def test_a_process_that_dies_within_an_update_is_not_waited_for(
    workshop: Workshop, fleets: Fleets, ranks: Ranks
) -> None:
    stays, dies = workshop.service(), workshop.service(faults={"apply_delay_s": 600.0})
    stays.until_ready()
    dies.until_ready()
    sync = WeightSync(
        fleets.of([stays.url, dies.url], straggler_s=300.0), "run-a", ranks, block_bytes=1 << 20, ring_bytes=64 << 20
    )
    policy = load(MODEL, ranks)
    sync.connect(policy, identity(), 0, fresh=True)
    train(policy, 1, share=0.001)
    timer = threading.Timer(2.0, dies.kill)
    timer.start()
    row = sync.push(policy)
    assert not timer.is_alive(), "it was alive while the other committed"
    assert (row["sync/replicas"], stays.weights()["version"]) == (1, 1)
    assert row["sync/seconds"] < LIMIT_S
    lost = [line for line in fleets.said if line.startswith(f"{dies.url} gets no prompts: ")]
    assert len(lost) == 1, fleets.said  # either of who commits and who looks after it may be the first to see
