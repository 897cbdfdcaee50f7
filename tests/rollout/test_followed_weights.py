"""Two ranks without a service: an update is whole on both or on neither, and both say the same."""

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tests.helpers.wire_trainer import Update, delta_update
from torch import Tensor

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineError
from flashrl_rollout.followed_weights import FollowedWeights
from flashrl_rollout.rank_replies import Reply
from flashrl_rollout.runtime_map import Axis, Held, Region, RuntimePart, patterns_of
from flashrl_rollout.runtime_weights import RuntimeWeights, TakeBackError
from flashrl_wire.delta import Change, diff
from flashrl_wire.digest import bits
from flashrl_wire.errors import DigestMismatchError, StaleBaseError
from flashrl_wire.layout import PartSpec, TensorSpec, WeightLayout

LAYOUT = WeightLayout.of([TensorSpec(name="w", shape=(4, 6), storage="bf16")])
OLD, NEW, NEXT = (stored_state.random_parts(LAYOUT, seed) for seed in (0, 1, 2))
LIMIT = 1 << 20
WAIT_S = 20.0


class Meeting:
    """What an exchange between two threads needs: everybody's reply, once all have come."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=WAIT_S)
        self._replies: list[Reply] = [{}] * num_ranks

    def exchange(self, rank: int) -> Callable[[Reply], list[Reply]]:
        """The exchange as rank `rank` calls it."""

        def meet(reply: Reply) -> list[Reply]:
            self._replies[rank] = reply
            self._barrier.wait()
            replies = list(self._replies)
            self._barrier.wait()
            return replies

        return meet


class Ranks:
    """A bf16 [4, 6] matrix in two column slices, followed by two threads."""

    def __init__(self) -> None:
        self.memories = [OLD["w"][:, 3 * rank :][:, :3].clone() for rank in (0, 1)]
        self.fail_refresh = [False, False]
        meeting = Meeting(2)
        self._pool = ThreadPoolExecutor(2)
        self.followed = self.both(lambda rank: self._open(rank, meeting))

    def _open(self, rank: int, meeting: Meeting) -> FollowedWeights:
        region = Region.of(3 * rank, 0, iter([Axis(4, 6, 3), Axis(3, 1, 1)]))
        part = RuntimePart(PartSpec("w", "bf16", (4, 6)), (Held(region, patterns_of(self.memories[rank])),))
        description = {
            "tensors": [spec.model_dump(mode="json") for spec in LAYOUT.tensors],
            "regions": {"w": {region.key: region.numel}},
        }
        weights = RuntimeWeights({"w": part}, lambda _: self._refresh(rank))
        return FollowedWeights(description, weights, meeting.exchange(rank), LIMIT)

    def _refresh(self, rank: int) -> None:
        if self.fail_refresh[rank]:
            raise RuntimeError("no room to pack")

    def both(self, call: Callable[[int], Any]) -> list[Any]:
        """What a call gives on each rank, exceptions as values."""
        futures = [self._pool.submit(call, rank) for rank in (0, 1)]
        return [future.exception(WAIT_S) or future.result() for future in futures]

    def update(self, update: Update, *reads: Callable[[Mapping[str, PartSpec]], Iterable[Change]]) -> list[Any]:
        """Update both ranks; what each one raised or None."""
        return self.both(lambda rank: self.followed[rank].update(update.manifest, reads[rank % len(reads)]))

    def holds(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether both ranks together hold exactly this."""
        return torch.equal(bits(torch.cat(self.memories, dim=1)), bits(parts["w"]))


def reading(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Callable[[Mapping[str, PartSpec]], list[Change]]:
    found = diff("w", old["w"], new["w"])
    assert found is not None
    return lambda _: [found[0]]


def broken(_: Mapping[str, PartSpec]) -> Iterable[Change]:
    yield from reading(OLD, NEW)({})
    raise OSError("the file has gone")


def test_two_updates_in_a_row() -> None:
    ranks = Ranks()
    assert ranks.update(delta_update(LAYOUT, OLD, NEW), reading(OLD, NEW)) == [None, None]
    assert ranks.holds(NEW)
    assert ranks.update(delta_update(LAYOUT, NEW, NEXT, base=1), reading(NEW, NEXT)) == [None, None]
    assert ranks.holds(NEXT)
    states = [followed.state() for followed in ranks.followed]
    assert states[0] == states[1]
    assert (states[0]["version"], states[0]["digest"]) == (
        2,
        stored_state.combined(LAYOUT, stored_state.digests(NEXT)),
    )


def test_one_rank_that_fails_takes_the_other_back() -> None:
    ranks = Ranks()
    errors = ranks.update(delta_update(LAYOUT, OLD, NEW), reading(OLD, NEW), broken)
    assert [type(error) for error in errors] == [EngineError, EngineError]
    assert {str(error) for error in errors} == {"OSError: the file has gone"}
    assert ranks.holds(OLD)
    assert ranks.update(delta_update(LAYOUT, OLD, NEW), reading(OLD, NEW)) == [None, None]
    assert ranks.holds(NEW)


def test_content_that_is_not_what_the_manifest_says_is_taken_back() -> None:
    ranks = Ranks()
    errors = ranks.update(delta_update(LAYOUT, OLD, NEW), reading(OLD, NEXT))
    assert [type(error) for error in errors] == [DigestMismatchError] * 2
    assert ranks.holds(OLD)


def test_a_delta_from_another_base_is_refused() -> None:
    ranks = Ranks()
    errors = ranks.update(delta_update(LAYOUT, NEXT, NEW), reading(NEXT, NEW))
    assert [type(error) for error in errors] == [StaleBaseError] * 2
    assert ranks.holds(OLD)


def test_a_rank_that_cannot_go_back_is_everybodys_end() -> None:
    ranks = Ranks()
    ranks.fail_refresh[1] = True
    errors = ranks.update(delta_update(LAYOUT, OLD, NEW), reading(OLD, NEW))
    assert [type(error) for error in errors] == [TakeBackError] * 2
