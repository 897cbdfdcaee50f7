"""The trainer's other commands against a whole service."""

import re
import shutil
from typing import Any

from safetensors.torch import load_file, save_file
from tests.helpers.live_service import live
from tests.helpers.workshop import MODEL, Workshop

from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.scripted_folder import open_folder


class NeverTheSame(ScriptedEngine):
    """Draws other tokens after every commit, whatever the weights."""

    def _draw(self, prompt: list[int], seed: str, tokens: list[int]) -> tuple[int, float]:
        return super()._draw(prompt, f"{seed} {self._version}", tokens)


def test_check_sync_moves_the_version_and_nothing_else(workshop: Workshop) -> None:
    service = workshop.service()
    ended = workshop.trainer(service.url, command="check-sync").wait()
    assert ended.code == 0, ended.errors
    weights = service.weights()
    moved, mismatch = ended.output.splitlines()
    assert moved == f"version 0 -> 2, digest {weights['digest']} and greedy output of 16 prompts unchanged"
    assert mismatch.startswith("mismatch at lr = 0: k3_kl ")
    assert (weights["version"], weights["run_id"]) == (2, None), "a run may follow"


def test_check_sync_finds_output_that_moves(workshop: Workshop) -> None:
    with live(lambda: open_folder(MODEL, kind=NeverTheSame), workshop.folder) as service:
        ended = workshop.trainer(service.url, command="check-sync").wait()
    assert (ended.code, ended.output) == (2, "")
    assert ended.errors.splitlines()[-1] == "error: check-sync: greedy output moved at lr = 0"


def test_eval_of_what_is_served_and_of_a_checkpoint(workshop: Workshop) -> None:
    model = workshop.folder / "trained"
    shutil.copytree(MODEL, model)
    weights = load_file(model / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, model / "model.safetensors")
    with live(lambda: open_folder(MODEL), workshop.folder, checkpoint_roots=[workshop.folder]) as service:
        served = workshop.trainer(service.url, command="eval", eval__problems=20).wait()
        loaded = workshop.trainer(
            service.url, f"--checkpoint={model}", command="eval", eval__problems=20, eval__greedy="false"
        ).wait()
        version = service.service.weights_info().version
    assert (served.code, loaded.code, version) == (0, 0, 1), served.errors + loaded.errors
    line = r"20 problems: sampled \d+\.\d% \(20 samples\)"
    assert re.fullmatch(line + r", greedy \d+\.\d%\n", served.output)
    assert re.fullmatch(line + r"\n", loaded.output)


def test_eval_names_a_folder_that_the_service_may_not_read(workshop: Workshop) -> None:
    service = workshop.service()
    ended = workshop.trainer(service.url, "--checkpoint=/etc", command="eval").wait()
    assert ended.code == 1
    assert ended.errors == "error: etc does not lie under a checkpoint root\n"


def test_doctor_finds_nothing_missing_and_touches_nothing(workshop: Workshop) -> None:
    service = workshop.service()
    before = service.weights()
    ended = workshop.trainer(service.url, command="doctor").wait()
    lines = ended.output.splitlines()
    assert (ended.code, all(line.startswith("ok ") for line in lines)) == (0, True), ended.output
    assert f"ok      service: {service.url} serves {MODEL} as int8, version 0" in lines
    assert service.weights() == before
    assert not workshop.runs.exists()


def test_doctor_names_all_that_is_missing(workshop: Workshop) -> None:
    service = workshop.service()
    wrong: dict[str, Any] = {"data__train": "/no/such.jsonl", "rollout__quantization": "fp8"}
    ended = workshop.trainer(service.url, command="doctor", **wrong).wait()
    assert ended.code == 1
    assert [line for line in ended.output.splitlines() if line.startswith("missing")] == [
        "missing model and data: data.train: no file /no/such.jsonl",
        "missing service: the service runs int8, rollout.quantization is fp8",
    ]
