"""Writing, reading back, taking back: over memory laid out like a fused matrix and a slice of columns."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from flashrl_rollout.place import AtIndices, InRun, Place
from flashrl_rollout.runtime_map import Axis, Held, Region, RuntimePart, patterns_of
from flashrl_rollout.runtime_weights import RuntimeWeights, TakeBackError
from flashrl_rollout.undo import UndoLog
from flashrl_wire.delta import Change, snapshot
from flashrl_wire.digest import PartDigest, bits, digest_range
from flashrl_wire.layout import PartSpec


class Rig:
    """A fused bf16 [4, 6] matrix of parts `a` (rows 0-2) and `b` (row 3), and one fp8 part in a column slice."""

    def __init__(self, group_elements: int | None = None) -> None:
        self.fused = torch.arange(24, dtype=torch.float32).view(4, 6).to(torch.bfloat16)
        self.slice = torch.ones(2, 3).to(torch.float8_e4m3fn)
        self.refreshed: list[set[int]] = []
        self.fail = False
        a = _run(PartSpec("a", "bf16", (3, 6)), 0, self.fused)
        b = _run(PartSpec("b", "bf16", (6,)), 18, self.fused)
        region = Region.of(3, 0, iter([Axis(2, 6, 3), Axis(3, 1, 1)]))
        c = RuntimePart(PartSpec("c", "fp8", (2, 6)), (Held(region, patterns_of(self.slice)),))
        self.weights = RuntimeWeights({"a": a, "b": b, "c": c}, self._refresh, group_elements)

    def _refresh(self, touched: set[int]) -> None:
        if self.fail:
            raise RuntimeError("no room to pack")
        self.refreshed.append(set(touched))

    def state(self) -> tuple[Tensor, Tensor]:
        """The bits of both tensors."""
        return bits(self.fused).clone(), bits(self.slice).clone()

    def total(self) -> dict[str, PartDigest]:
        """Digest of each part, from memory."""
        return {name: sum(regions.values(), PartDigest()) for name, regions in self.weights.digests().items()}


def _run(spec: PartSpec, at: int, tensor: Tensor) -> RuntimePart:
    region = Region.of(0, at, iter([Axis(spec.numel, 1, 1)]))
    return RuntimePart(spec, (Held(region, patterns_of(tensor)),))


def _changes() -> list[Change]:
    nan = torch.tensor([float("nan"), -0.0]).to(torch.bfloat16)
    return [
        Change("a", nan, indices=torch.tensor([2, 17])),
        snapshot("b", torch.full((6,), 5.0, dtype=torch.bfloat16)),
        Change("c", torch.full((12,), 2.0).to(torch.float8_e4m3fn)),
    ]


def test_write_changes_exactly_the_named_elements() -> None:
    rig = Rig()
    before = rig.fused.clone()
    rig.weights.write(_changes())
    flat = rig.fused.view(-1)
    assert torch.isnan(flat[2])
    assert bits(flat[17:18]).item() == bits(torch.tensor([-0.0]).to(torch.bfloat16)).item()
    assert (flat[18:] == 5).all()
    untouched = [i for i in range(18) if i not in (2, 17)]
    assert torch.equal(flat[untouched], before.view(-1)[untouched])
    assert (rig.slice.float() == 2).all()
    assert rig.refreshed[-1] == {rig.fused.data_ptr(), rig.slice.data_ptr()}


@pytest.mark.parametrize("ahead_bytes", [0, 1, 40, 80, 1 << 20])
@pytest.mark.parametrize("group_elements", [1, 2, 5, None])
def test_a_prepared_update_is_written_as_any_other(group_elements: int, ahead_bytes: int) -> None:
    """Whatever part of it there was room for, and nothing is written before it is time."""
    plain, ahead = Rig(group_elements), Rig(group_elements)
    before = ahead.state()
    prepared = ahead.weights.prepare(_changes(), ahead_bytes)
    assert all(torch.equal(new, old) for new, old in zip(ahead.state(), before, strict=True))
    assert ahead.weights.write(prepared) == plain.weights.write(_changes())
    assert all(torch.equal(new, old) for new, old in zip(ahead.state(), plain.state(), strict=True))
    assert ahead.refreshed == [{ahead.fused.data_ptr(), ahead.slice.data_ptr()}]
    ahead.weights.revert()
    assert all(torch.equal(new, old) for new, old in zip(ahead.state(), before, strict=True))


def test_all_of_an_update_is_prepared_where_there_is_room() -> None:
    rig = Rig(group_elements=5)
    prepared = rig.weights.prepare(_changes())
    assert sum(run.patterns.numel() for group in prepared.ready for run in group.runs) == 6
    assert sum(place.patterns.numel() for group in prepared.ready for place in group.scattered) == 2 + 6
    assert list(prepared.rest) == []


def test_what_is_made_ready_leaves_most_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for free_bytes, room_for in ((1 << 30, 14), (4, 2), (0, 0)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free_bytes: SimpleNamespace(available=free))
        ready = Rig(group_elements=5).weights.prepare(_changes()).ready
        assert sum(place.patterns.numel() for group in ready for place in group.places) == room_for


def test_what_is_written_twice_is_not_read_ahead() -> None:
    rig = Rig()
    first = Change("b", torch.full((6,), 1.0, dtype=torch.bfloat16))
    second = Change("b", torch.full((2,), 2.0, dtype=torch.bfloat16), indices=torch.tensor([0, 5]))
    prepared = rig.weights.prepare([first, second])
    assert len(prepared.ready) == 1
    before = rig.total()["b"]
    shifts = rig.weights.write(prepared)
    assert before + shifts["b"]["0+6x1"] == digest_range(torch.tensor([2.0, 1, 1, 1, 1, 2]).to(torch.bfloat16))


def test_nothing_is_prepared_on_top_of_what_may_be_taken_back() -> None:
    rig = Rig()
    before = rig.total()
    rig.weights.write([snapshot("b", torch.zeros(6, dtype=torch.bfloat16))])
    prepared = rig.weights.prepare(_changes())
    assert prepared.ready == []
    shifts = rig.weights.write(prepared)
    assert all(before[part] + sum(shifts[part].values(), PartDigest()) == found for part, found in rig.total().items())


class _Losing(Tensor):
    """Memory that loses writes."""

    def __setitem__(self, *_: object) -> None:
        pass

    def scatter_(self, *_: object) -> Tensor:  # type: ignore[override]
        return self


@pytest.mark.parametrize("kind", ["runs", "scattered"])
def test_a_write_that_does_not_stick_is_found_and_undone(kind: str) -> None:
    rig = Rig()
    before = rig.state()
    prepared = rig.weights.prepare(_changes())
    first, *others = getattr(prepared.ready[0], kind)
    lost = (replace(first, memory=first.memory.as_subclass(_Losing)), *others)
    with pytest.raises(ValueError, match="does not hold what was written"):
        rig.weights.write(replace(prepared, ready=[replace(prepared.ready[0], **{kind: lost})]))
    assert all(torch.equal(new, old) for new, old in zip(rig.state(), before, strict=True))


@pytest.mark.parametrize("group_elements", [1, 2, 5, 13, None])
def test_shifts_are_the_difference_of_full_digests(group_elements: int | None) -> None:
    rig = Rig(group_elements)
    before = rig.total()
    shifts = rig.weights.write(_changes())
    assert (rig.slice.float() == 2).all()
    for name, digest in rig.total().items():
        assert before[name] + sum(shifts[name].values(), PartDigest()) == digest
    assert rig.total()["b"] == digest_range(torch.full((6,), 5.0, dtype=torch.bfloat16))


def test_revert_restores_every_bit_and_refreshes() -> None:
    rig = Rig()
    before, digests = rig.state(), rig.total()
    rig.weights.write(_changes())
    rig.weights.revert()
    assert all(torch.equal(new, old) for new, old in zip(rig.state(), before, strict=True))
    assert rig.total() == digests
    assert rig.refreshed[-1] == {rig.fused.data_ptr(), rig.slice.data_ptr()}


def test_overlapping_changes_of_one_update_revert_to_the_first_state() -> None:
    rig = Rig()
    before = rig.state()
    first = Change("b", torch.full((6,), 1.0, dtype=torch.bfloat16))
    second = Change("b", torch.full((2,), 2.0, dtype=torch.bfloat16), indices=torch.tensor([0, 5]))
    shifts = rig.weights.write([first, second])
    assert rig.total()["b"] == digest_range(torch.tensor([2.0, 1, 1, 1, 1, 2]).to(torch.bfloat16))
    rig.weights.revert()
    assert sum(shifts["b"].values(), rig.total()["b"]) == digest_range(torch.tensor([2.0, 1, 1, 1, 1, 2]).bfloat16())
    assert torch.equal(rig.state()[0], before[0])


def test_keep_makes_revert_harmless() -> None:
    rig = Rig()
    rig.weights.write(_changes())
    rig.weights.keep()
    kept = rig.state()
    rig.weights.revert()
    assert all(torch.equal(new, old) for new, old in zip(rig.state(), kept, strict=True))


def test_a_pending_update_is_taken_back_before_the_next() -> None:
    rig = Rig()
    before = rig.total()
    rig.weights.write(_changes())
    shifts = rig.weights.write([snapshot("b", torch.zeros(6, dtype=torch.bfloat16))])
    after = rig.total()
    assert {name for name in after if after[name] != before[name]} == {"b"}
    assert before["b"] + sum(shifts["b"].values(), PartDigest()) == after["b"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Change("x", torch.zeros(1)), "x is no part"),
        (Change("a", torch.zeros(1)), "a holds bf16, not torch.float32"),
        (Change("b", torch.zeros(6, dtype=torch.bfloat16), start=1), "b has 6 elements, .* from 1 to 7"),
        (Change("b", torch.zeros(1, dtype=torch.bfloat16), indices=torch.tensor([-1])), "from -1 to 0"),
    ],
)
def test_a_change_that_does_not_fit_undoes_those_before_it(bad: Change, message: str) -> None:
    rig = Rig()
    before = rig.state()
    with pytest.raises(ValueError, match=message):
        rig.weights.write([*_changes(), bad])
    assert all(torch.equal(new, old) for new, old in zip(rig.state(), before, strict=True))


def test_a_source_that_breaks_off_leaves_nothing_behind() -> None:
    def breaking() -> Iterator[Change]:
        yield from _changes()
        raise KeyError("file gone")

    rig = Rig()
    before = rig.state()
    with pytest.raises(KeyError, match="file gone"):
        rig.weights.write(breaking())
    assert all(torch.equal(new, old) for new, old in zip(rig.state(), before, strict=True))


def test_a_refresh_that_fails_twice_is_told_apart() -> None:
    rig = Rig()
    before = rig.state()
    rig.fail = True
    with pytest.raises(TakeBackError, match="old values could not be put back: no room to pack"):
        rig.weights.write(_changes())
    rig.fail = False
    rig.weights.revert()
    assert all(torch.equal(new, old) for new, old in zip(rig.state(), before, strict=True))
    assert rig.refreshed[-1] == {rig.fused.data_ptr(), rig.slice.data_ptr()}


def test_the_undo_log_works_beyond_its_room_on_the_device() -> None:
    memory = torch.arange(8, dtype=torch.int16)
    log = UndoLog(device_bytes=4)
    where = torch.tensor([1, 5])
    places: list[Place] = [
        InRun(memory, slice(0, 2), torch.full((2,), -1, dtype=torch.int16)),
        AtIndices(memory, where, torch.full((2,), -1, dtype=torch.int16), memory[where]),
        InRun(memory, slice(4, 8), torch.full((4,), -1, dtype=torch.int16)),
    ]
    for place in places:
        log.add(place)
        place.write()
    assert memory.tolist() == [-1, -1, 2, 3, -1, -1, -1, -1]
    log.take_back()
    assert memory.tolist() == list(range(8))
    assert len(log) == 0


def test_on_the_host_nothing_is_kept_on_the_device() -> None:
    memory = torch.arange(8, dtype=torch.int16)
    run = InRun(memory, slice(0, 2), torch.full((2,), -1, dtype=torch.int16)).on_host()
    few = AtIndices(memory, torch.tensor([1]), torch.full((1,), -1, dtype=torch.int16), memory[[1]]).on_host()
    for place in (run, few):
        assert place.patterns.untyped_storage().nbytes() == 0, "a view would keep all of it on the device"


def test_a_run_that_was_not_written_takes_nothing_back() -> None:
    memory = torch.arange(4, dtype=torch.int16)
    InRun(memory, slice(0, 2), torch.full((2,), -1, dtype=torch.int16)).take_back()
    assert memory.tolist() == [0, 1, 2, 3]


def test_an_update_of_everything_needs_room_for_its_new_values_only() -> None:
    rig = Rig()
    prepared = rig.weights.prepare([snapshot("b", torch.full((6,), 5.0, dtype=torch.bfloat16))])
    assert sum(group.nbytes for group in prepared.ready) == 6 * 2


@pytest.mark.parametrize("ahead_bytes", [0, 1 << 20])
def test_two_copies_of_a_part_take_the_same_change_and_take_it_back(ahead_bytes: int) -> None:
    """They share their new values, in whose memory the old ones are kept."""
    memory = [torch.arange(6, dtype=torch.float32).to(torch.bfloat16) for _ in range(2)]
    region = Region.of(0, 0, iter([Axis(6, 1, 1)]))
    held = tuple(Held(region, patterns_of(tensor)) for tensor in memory)
    weights = RuntimeWeights({"a": RuntimePart(PartSpec("a", "bf16", (6,)), held)}, lambda touched: None)
    weights.write(weights.prepare([snapshot("a", torch.full((6,), 5.0, dtype=torch.bfloat16))], ahead_bytes))
    assert all((tensor == 5).all() for tensor in memory)
    weights.revert()
    assert all(tensor.tolist() == [0, 1, 2, 3, 4, 5] for tensor in memory)
