"""Ranks that wait for another: what they say, and that they do not wait for ever."""

from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from tests.helpers import rank_programs
from tests.helpers.rank_job import RankJob, run_ranks
from torch.distributed import DistNetworkError, DistStoreError

from flashrl_trainer.main_signal import MainSignal, RankLostError

LIMIT_S = 8.0  # also for ranks to find each other, on a busy machine


@dataclass
class ScriptedStore:
    """A store whose waits end as told: "there", "gone", "late" (the limit is over), or "late, beating"."""

    waits: list[str]
    beats: int = 0
    keys: list[str] = field(default_factory=list)
    limits_s: list[float] = field(default_factory=list)

    def set(self, key: str, value: str, /) -> None:
        self.keys.append(key)

    def add(self, key: str, amount: int, /) -> int:
        self.beats += amount
        return self.beats

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        self.limits_s.append(timeout.total_seconds())
        how = self.waits.pop(0)
        self.beats += how == "late, beating"
        if how == "gone":
            raise DistNetworkError("connection reset")
        if how != "there":
            raise DistStoreError("wait timeout")

    def delete_key(self, key: str, /) -> bool:
        self.keys.remove(key)
        return True


def test_work_that_gets_on_may_take_longer_than_the_limit() -> None:
    store = ScriptedStore(["late, beating", "late, beating", "there"])
    MainSignal(store, 1, 7.0).wait()
    assert store.limits_s == [7.0] * 3


def test_work_that_stands_still_for_the_limit_is_given_up() -> None:
    store = ScriptedStore(["late, beating", "late", "there"])
    with pytest.raises(RankLostError, match=r"^rank 3: rank 0 has neither finished its work .* for 7 s; it hangs"):
        MainSignal(store, 3, 7.0).wait()
    assert store.waits == ["there"]


def test_a_store_that_ended_with_rank_0_is_named() -> None:
    with pytest.raises(RankLostError, match=r"^rank 1: rank 0 has ended; see its output$"):
        MainSignal(ScriptedStore(["gone"]), 1, 7.0).wait()


def test_calls_are_counted_alike_and_old_keys_are_deleted() -> None:
    store = ScriptedStore([])
    signal = MainSignal(store, 0, 7.0)
    for _ in range(1003):
        signal.announce()
    assert (store.keys[0], store.keys[-1], len(store.keys)) == ("call-4", "call-1003", 1000)


def test_what_rank_0_raises_is_raised_everywhere() -> None:
    ends = run_ranks(rank_programs.wait_for_main, 2, "raises", 60.0)
    assert [end.error for end in ends] == ["ValueError: data.train: no such file"] * 2
    assert [end.value for end in run_ranks(rank_programs.wait_for_main, 2, "works", 60.0)] == ["done"] * 2


def test_ranks_whose_rank_0_hangs_or_dies_end_within_the_limit_and_say_so() -> None:
    for kind, message in (("hangs", "rank 0 has neither finished its work"), ("dies", "rank 0 has ended")):
        job = RankJob(rank_programs.wait_for_main, 3, kind, LIMIT_S)
        try:
            for rank in (1, 2):
                assert job.end(rank).error.startswith(f"RankLostError: rank {rank}: {message}")
        finally:
            job.kill()


def test_a_collective_whose_partner_dies_is_a_line_that_says_so() -> None:
    job = RankJob(rank_programs.wait_for_rank_one, 2, LIMIT_S)
    try:
        assert job.end(0).error.startswith("RankLostError: rank 0: another rank has ended or hangs; see its output (")
    finally:
        job.kill()
