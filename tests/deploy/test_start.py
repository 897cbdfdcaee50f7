"""What a container runs, and how the end of the trainer becomes that of the service."""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import start

RECIPE: Mapping[str, str] = {"FLASHRL_RECIPE": "configs/gsm8k_0.5b_int8.toml"}
TRAIN = ["-m", "flashrl_trainer", "train", "--config", "configs/gsm8k_0.5b_int8.toml", "--resume", "auto"]


def test_a_run_is_named_after_its_recipe_or_as_one_says() -> None:
    assert start.trainer_command(RECIPE) == [sys.executable, *TRAIN, "--set", "run.name=gsm8k_0.5b_int8"]
    named = start.trainer_command({**RECIPE, "FLASHRL_RUN": "second"})
    assert named[-1] == "run.name=second"


def test_arguments_of_ones_own_come_last_and_may_be_quoted() -> None:
    command = start.trainer_command({**RECIPE, "FLASHRL_TRAIN_ARGS": "--set run.steps=3 --set 'data.reward=a b'"})
    assert command[-4:] == ["--set", "run.steps=3", "--set", "data.reward=a b"]


def test_several_ranks_are_started_by_torchrun() -> None:
    one_node = start.trainer_command({**RECIPE, "FLASHRL_PROCESSES": "4"})
    assert one_node[:4] == ["torchrun", "--standalone", "--nproc-per-node", "4"]
    two = {"FLASHRL_PROCESSES": "8", "FLASHRL_NODES": "2", "FLASHRL_RENDEZVOUS": "trainer-0.ranks:29400"}
    assert start.launcher(two) == [
        *("torchrun", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "flashrl"),
        *("--rdzv-endpoint", "trainer-0.ranks:29400", "--nproc-per-node", "8"),
    ]


def test_only_a_service_on_the_cpu_gets_a_number_of_threads() -> None:
    assert start.rollout_command({"FLASHRL_ROLLOUT_DEVICE": "cuda"}) == ["flashrl-rollout", "serve"]
    on_cpu = start.rollout_command({"FLASHRL_ROLLOUT_DEVICE": "cpu", "FLASHRL_SERVE_ARGS": "--engines 2"})
    assert on_cpu[:5] == ["flashrl-rollout", "serve", "--engines", "2", "--threads"]
    assert 1 <= int(on_cpu[5]) <= 4
    assert "--threads" not in start.rollout_command({"FLASHRL_ROLLOUT_DEVICE": "cpu", "FLASHRL_ROLLOUT_THREADS": "3"})


@pytest.mark.parametrize(
    ("codes", "ended"),
    [([0], 0), ([2], 2), ([1, 1, 1, 1], None), ([1, 1, 1, 1, 1], 1), ([137] * 9, None), ([130], None), ([1, 0], 0)],
)
def test_success_a_wrong_setting_and_the_fifth_failure_are_the_end(
    tmp_path: Path, codes: list[int], ended: int | None
) -> None:
    end = start.End(tmp_path)
    for code in codes:
        end.count(code)
    assert end.code() == ended
    end.reset()
    assert end.code() is None
    end.count(1)
    assert end.code() is None, "the failures of the last time count no more"


def test_exit_codes_are_those_of_a_shell() -> None:
    assert start.run([sys.executable, "-c", "raise SystemExit(7)"], None) == 7
    assert start.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], None) == 137


def test_a_signal_reaches_the_child() -> None:
    asks_for_it = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert start.run([sys.executable, "-c", asks_for_it], None) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_services_stop_where_the_trainer_has_ended(tmp_path: Path) -> None:
    """The child waits for ever, but writes the file that ends it."""
    end = start.End(tmp_path)
    ends_it = f"import time; open({str(tmp_path / 'end')!r}, 'w').write('0'); time.sleep(60)"
    assert start.run([sys.executable, "-c", ends_it], end) == 128 + signal.SIGTERM


def test_what_has_ended_is_not_run_again(tmp_path: Path) -> None:
    start.End(tmp_path).count(2)
    nowhere = {"FLASHRL_RECIPE": "no recipe", "FLASHRL_SERVE_ARGS": "--no-such-flag"}
    assert start.main([], {"FLASHRL_PART": "trainer", **nowhere}, tmp_path) == 2
    assert start.main([], {"FLASHRL_PART": "rollout-cpu", **nowhere}, tmp_path) == 0


def test_a_command_of_ones_own_runs_as_the_part(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "raise SystemExit(2)"]
    assert start.main(failing, {"FLASHRL_PART": "trainer"}, tmp_path) == 2
    assert start.End(tmp_path).code() == 2
