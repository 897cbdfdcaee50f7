"""`flashrl-trainer train` against a whole service: real HTTP, real ZeroMQ, real processes, scripted tokens.

One straight run of four steps is what resumed ones are held to: every token depends on the weights' digest, so equal
rows and digests mean equal weights at every step.
"""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import torch
from tests.helpers.workshop import MODEL, STEM, STEPS, Straight, Workshop, rows, state, timeless, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashrl_rollout import stored_state
from flashrl_rollout.scripted_folder import folder_layout
from flashrl_trainer.metric_rows import METRIC_KEYS


def test_run_records_every_number_of_every_step(straight: Straight) -> None:
    assert straight.ended.code == 0, straight.ended.errors
    recorded = rows(straight.folder)
    assert [row["step"] for row in recorded] == [0, 1, 2, 3, 4]
    assert [row["weight_version"] for row in recorded] == [0, 1, 2, 3, 4]
    for row in recorded:
        assert set(METRIC_KEYS) <= set(row)
        evaluated = {"eval/accuracy", "eval/greedy"} if row["step"] % 2 == 0 else set()
        nulls = {key for key, value in row.items() if value is None}
        assert nulls & set(METRIC_KEYS) - {"perf/mfu"} == {"eval/accuracy", "eval/greedy"} - evaluated
        assert all(math.isfinite(value) for value in row.values() if value is not None)


def test_every_sync_is_a_delta_that_is_smaller_than_the_weights(straight: Straight) -> None:
    steps = rows(straight.folder)[1:]
    assert [row["sync/kind"] for row in steps] == [0] * STEPS
    assert all(0 < row["sync/wire_bytes"] < row["sync/full_bytes"] for row in steps)
    assert all(0 < row["sync/changed_fraction"] < 1 for row in steps)


def test_samples_of_mixed_groups_are_learned_from(straight: Straight) -> None:
    steps = rows(straight.folder)[1:]
    assert all(row["grad_norm"] > 0 for row in steps)
    assert all(row["sampling/groups_kept"] < row["sampling/groups_seen"] for row in steps[:1])
    samples = [json.loads(line) for line in (straight.folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2, 3, 4}


def test_service_holds_the_digest_that_the_trainer_saved(straight: Straight) -> None:
    saved = [state(straight.folder, step) for step in range(1, STEPS + 1)]
    assert (straight.version, straight.digest) == (STEPS, saved[-1]["digest"])
    assert [boundary["weight_version"] for boundary in saved] == [1, 2, 3, 4]
    assert len({boundary["digest"] for boundary in saved}) == STEPS


def test_export_is_what_the_service_serves(straight: Straight) -> None:
    export = straight.folder / "export"
    layout = folder_layout(export, "int8")
    assert layout == folder_layout(MODEL, "int8")
    assert (
        stored_state.combined(layout, stored_state.digests(stored_state.read_parts(export, layout))) == straight.digest
    )
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(export).get_vocab() == AutoTokenizer.from_pretrained(MODEL).get_vocab()


def test_resumed_run_makes_the_same_steps_on_a_restarted_service(straight: Straight, workshop: Workshop) -> None:
    """From the newest run, its newest whole checkpoint, on a service that has its first weights again."""
    older, newest = workshop.runs / f"{STEM}-20240101-000000", workshop.runs / f"{STEM}-20250101-000000"
    shutil.copytree(straight.folder, newest)
    shutil.copytree(straight.folder / "checkpoints/step-000001", older / "checkpoints/step-000001")
    truncate(newest / "checkpoints/step-000003")
    flip_a_bit(newest / "checkpoints/step-000004")
    assert state(newest, 2)["sampling"]["surplus"], "choose a seed under which a surplus is carried over"
    service = workshop.service()
    ended = workshop.trainer(service.url, "--resume=auto").wait()
    assert ended.code == 0, ended.errors
    fourth, third = (line for line in ended.errors.splitlines() if line.endswith("and passed over"))
    assert re.search(r"step-000004 is damaged \(\S+ has changed\)", fourth)
    assert re.search(r"step-000003 is damaged \(\S+ has [\d,]+ of [\d,]+ bytes\)", third)
    assert sorted(path.name for path in workshop.runs.iterdir()) == [older.name, newest.name]
    assert [timeless(row) for row in rows(newest)] == [timeless(row) for row in rows(straight.folder)]
    assert service.weights()["digest"] == state(newest, 4)["digest"] == straight.digest
    assert service.weights()["version"] == STEPS


def test_finished_run_that_is_resumed_trains_no_further(straight: Straight, workshop: Workshop) -> None:
    run = workshop.runs / "done"
    shutil.copytree(straight.folder, run)
    service = workshop.service()
    ended = workshop.trainer(service.url, f"--resume={run}").wait()
    assert ended.code == 0, ended.errors
    assert rows(run) == rows(straight.folder)
    assert service.weights()["digest"] == straight.digest


def flip_a_bit(checkpoint: Path) -> None:
    """As a disk that is going bad leaves it: nothing but a checksum tells."""
    largest = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))


def truncate(checkpoint: Path) -> None:
    """As a full disk or a lost machine leaves it."""
    largest = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size - 1)


def test_run_that_samples_ahead_trains_on_samples_of_one_version_ago(workshop: Workshop) -> None:
    service = workshop.service(token_s=0.002)
    ended = workshop.trainer(service.url, algorithm__max_staleness=1).wait()
    assert ended.code == 0, ended.errors
    trained = rows(workshop.run_folder())[1:]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert trained[0]["staleness/max"] == 0
    assert [row["staleness/max"] for row in trained[1:]] == [1, 1, 1]
    assert [row["weight_version"] for row in trained] == [1, 2, 3, 4]
    assert service.weights()["digest"] == state(workshop.run_folder(), 4)["digest"]


def test_interrupted_run_that_samples_ahead_goes_on(workshop: Workshop) -> None:
    service = workshop.service(token_s=0.02)
    trainer = workshop.trainer(service.url, algorithm__max_staleness=1)
    until(lambda: len(workshop.recorded()) == 3, trainer)
    trainer.signal(signal.SIGINT)
    ended = trainer.wait()
    assert ended.code == 130, ended.errors
    assert "Traceback" not in ended.errors
    assert not service.is_sampling
    resumed = workshop.trainer(service.url, f"--resume={workshop.run_folder()}", algorithm__max_staleness=1).wait()
    assert resumed.code == 0, resumed.errors
    assert [row["step"] for row in rows(workshop.run_folder())] == [0, 1, 2, 3, 4]
