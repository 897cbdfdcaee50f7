"""The staging folder, the lease of a run, and the memory of finished transfers."""

from pathlib import Path

import pytest

from flashrl_rollout.departures import Departures
from flashrl_rollout.history import History
from flashrl_rollout.lease import RunLease
from flashrl_rollout.stage_dir import StageDir
from flashrl_rollout.stall import StallWatch
from flashrl_wire.errors import TooLargeError, UnknownTransferError, UpdateInProgressError
from flashrl_wire.messages import CommitReply, LastUpdate

REPLY = CommitReply(version=1, digest="0" * 32, pause_ms=1.5, changed_elements=2, wire_bytes=3)


def test_leftovers_of_a_crash_are_removed_at_the_next_start(tmp_path: Path) -> None:
    first = StageDir(tmp_path, 8001)
    other = StageDir(tmp_path, 8002)
    first.close()
    first.path.mkdir(mode=0o700)
    for stage_dir in (first, other):
        stage_dir.file("left").write_bytes(b"x")
    second = StageDir(tmp_path, 8001)
    assert not second.file("left").exists()
    assert other.file("left").exists()
    second.close()
    assert not second.path.exists()


def test_folder_of_a_running_service_is_refused(tmp_path: Path) -> None:
    first = StageDir(tmp_path, 8001)
    first.file("staged").write_bytes(b"x")
    with pytest.raises(ValueError, match="stage_root: another service stages in"):
        StageDir(tmp_path, 8001)
    assert first.file("staged").exists()
    first.close()
    StageDir(tmp_path, 8001).close()


def test_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    stage_dir = StageDir(tmp_path, 1)
    stage_dir.path.rmdir()
    stage_dir.check_room(1000)
    assert stage_dir.path.stat().st_mode & 0o777 == 0o700
    stage_dir.path.rmdir()
    tmp_path.joinpath("elsewhere").mkdir(mode=0o700)
    stage_dir.path.symlink_to(tmp_path / "elsewhere")  # somebody was faster
    with pytest.raises(TooLargeError, match="belongs to another user"):
        stage_dir.check_room(1000)
    stage_dir.close()


def test_folder_with_other_files_is_left(tmp_path: Path) -> None:
    stage_dir = StageDir(tmp_path, 1)
    (stage_dir.path / "note").write_text("not ours")
    stage_dir.close()
    assert (stage_dir.path / "note").exists()


def test_folder_that_others_could_swap_is_refused(tmp_path: Path) -> None:
    path = StageDir(tmp_path, 1).path
    path.chmod(0o755)
    with pytest.raises(ValueError, match=r"stage_root: .*open to others"):
        StageDir(tmp_path, 1)
    path.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="stage_root"):
        StageDir(tmp_path, 1)


def test_missing_root_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage_root: cannot make"):
        StageDir(tmp_path / "none", 1)


def test_update_that_does_not_fit_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    stage_dir = StageDir(tmp_path, 1)
    stage_dir.check_room(1000)
    with pytest.raises(TooLargeError, match="shared memory size") as error:
        stage_dir.check_room(1 << 60)
    assert error.value.facts["needed_bytes"] == 1 << 60


def test_one_run_is_followed_until_it_is_released() -> None:
    lease = RunLease(idle_timeout_s=1000)
    lease.take("a")
    lease.take("a")
    with pytest.raises(UpdateInProgressError, match="follows run a"):
        lease.take("b")
    lease.release("b")
    assert lease.run_id == "a"
    lease.release("a")
    lease.take("b")
    assert lease.run_id == "b"


def test_silent_run_is_followed_no_longer() -> None:
    lease = RunLease(idle_timeout_s=-1)
    lease.take("a")
    lease.take("b")
    assert lease.run_id is None


def test_outcomes_are_remembered_for_a_while() -> None:
    history = History(0, lambda result, update: None)
    history.finish("failed", UnknownTransferError("aborted", fact=1))
    found = history.outcome("failed")
    assert isinstance(found, UnknownTransferError)
    assert (found.message, found.facts) == ("aborted", {"fact": 1})
    assert history.outcome("failed") is not found
    for index in range(64):
        history.finish(str(index), REPLY)
    assert history.outcome("failed") is None
    assert history.outcome("0") == REPLY


def test_every_third_commit_is_audited() -> None:
    seen: list[tuple[str, LastUpdate | None]] = []
    history = History(3, lambda result, update: seen.append((result, update)))
    assert [history.commit("delta", REPLY, 0.5) for _ in range(7)] == [False, False, True, False, False, True, False]
    update = LastUpdate(kind="delta", version=1, changed_elements=2, wire_bytes=3, pause_ms=1.5, seconds=0.5)
    assert seen == [("committed", update)] * 7
    assert History(0, lambda result, update: None).commit("delta", REPLY, 0.5) is False


def test_a_raised_error_is_remembered_without_its_frames() -> None:
    history = History(0, lambda result, update: None)
    with pytest.raises(UnknownTransferError) as raised:
        raise UnknownTransferError("aborted", fact=1)
    history.finish("failed", raised.value)
    (kept,) = history._finished.values()
    assert isinstance(kept, UnknownTransferError)
    assert (kept.message, kept.facts, kept.__traceback__) == ("aborted", {"fact": 1}, None)


def test_wait_follows_from_how_fast_sequences_leave() -> None:
    now = [100.0]
    departures = Departures(lambda: now[0])
    assert departures.seconds_until(1) == 5  # nobody has left yet
    for _ in range(10):
        now[0] += 2.0
        departures.add(3)  # 1.5 a second
    assert departures.seconds_until(1) == 1
    assert departures.seconds_until(6) == 4
    assert departures.seconds_until(10_000) == 60
    now[0] += 100.0
    assert departures.seconds_until(1) == 5  # that was long ago


def test_rate_is_that_of_the_last_departures() -> None:
    now = [0.0]
    departures = Departures(lambda: now[0])
    now[0] = 50.0
    for _ in range(256):
        now[0] += 0.01
        departures.add(1)
    assert departures.seconds_until(300) == 3  # 256 in 2.55 s, whatever was before


def test_stalled_is_who_has_work_and_makes_no_step() -> None:
    now = [0.0]
    watch = StallWatch(10.0, lambda: now[0])
    assert not watch.is_stalled(True, 1.0)
    now[0] = 10.0
    assert not watch.is_stalled(True, 1.0)
    now[0] = 10.5
    assert watch.is_stalled(True, 1.0)
    assert not watch.is_stalled(True, 2.0)  # a step after all
    now[0] = 100.0
    assert not watch.is_stalled(False, 2.0)  # idle for long
    now[0] = 109.0
    assert not watch.is_stalled(True, 2.0)  # the work has just come
    now[0] = 110.5
    assert watch.is_stalled(True, 2.0)
