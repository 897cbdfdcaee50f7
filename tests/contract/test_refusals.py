"""What a trainer refuses before its first step, each in one line that says what is wrong."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.forked import ServiceProgram
from tests.helpers.workshop import MODEL, ROOT, Workshop

NO_SERVICE = "http://127.0.0.1:9"  # the discard port: whoever gets as far as asking it fails with another line


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        ("optim.lrr", "1", "optim.lrr: unknown setting; did you mean optim.lr?"),
        ("algorithm.tis_cap", "0.5", "algorithm.tis_cap: must be >= 1, got 0.5"),
        ("sampling.top_p", "0.9", "sampling.top_p: must be 1, got 0.9: anything else cuts the sampled distribution"),
        ("model.path", "/no/such/model", "model.path: /no/such/model: no tokenizer"),
        ("data.train", "/no/such.jsonl", "data.train: no file /no/such.jsonl"),
        ("data.reward", "no.such:reward", "reward: cannot import 'no.such'"),
        ("data.reward", "tests.helpers.rewards:none", "reward: module 'tests.helpers.rewards' has no function 'none'"),
        ("rollout.urls", "http://127.0.0.1:port", "rollout.urls: http://127.0.0.1:port: Invalid port"),
        ("rollout.token_file", "/no/such/token", "rollout.token_file: /no/such/token: No such file or directory"),
    ],
)
def test_wrong_setting_is_one_line_and_2(setting: str, value: str, line: str, workshop: Workshop) -> None:
    ended = workshop.trainer(NO_SERVICE, f"--set={setting}={value}").wait()
    assert ended.code == 2, ended.errors
    assert ended.errors.startswith(f"error: {line}")
    assert ended.errors.count("\n") == 1
    assert not workshop.runs.exists()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProgram]:
    """INT8, the tiny model, version 0."""
    workshop = Workshop(tmp_path_factory.mktemp("service"))
    yield workshop.service()
    workshop.end()


def changed_model(folder: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(MODEL, folder / "model"))


def refusal(workshop: Workshop, service: ServiceProgram, **settings: Any) -> str:
    """The line of a trainer that did not start."""
    before = service.weights()
    ended = workshop.trainer(service.url, **settings).wait()
    assert ended.code == 2, ended.errors
    assert not workshop.runs.exists(), "no step was begun"
    assert service.weights() == before
    return ended.errors.splitlines()[-1]


def test_other_quantization(workshop: Workshop, service: ServiceProgram) -> None:
    line = refusal(workshop, service, rollout__quantization="fp8")
    assert line == f"error: trainer and service at {service.url} differ: quantization: fp8 here, int8 there"


def test_other_tokenizer(workshop: Workshop, service: ServiceProgram, tmp_path: Path) -> None:
    model = changed_model(tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha() and len(token) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal(workshop, service, model__path=model)
    assert line.startswith(f"error: trainer and service at {service.url} differ: tokenizer hash: ")


def test_other_weights(workshop: Workshop, service: ServiceProgram, tmp_path: Path) -> None:
    """One element by one bf16 step."""
    model = changed_model(tmp_path)
    weights = load_file(model / "model.safetensors")
    bits = weights["model.norm.weight"].view(torch.int16)
    bits[17] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refusal(workshop, service, model__path=model)
    assert line.startswith("error: weights: digest ")
    assert line.endswith(f"the service at {service.url} was started from another checkpoint ({MODEL})")


def test_other_shapes(workshop: Workshop, service: ServiceProgram, tmp_path: Path) -> None:
    model = changed_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (model / "config.json").write_text(json.dumps(config))
    line = refusal(workshop, service, model__path=model)
    assert line.endswith("differ: model.layers.3.input_layernorm.weight is only in the service's model")


def test_other_vocabulary_size(workshop: Workshop, service: ServiceProgram, tmp_path: Path) -> None:
    """As a checkpoint whose embedding was padded."""
    model = changed_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] += 8
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:8])])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refusal(workshop, service, model__path=model)
    assert line.startswith(f"error: trainer and service at {service.url} differ: {name} ")


def test_service_that_accepts_and_says_nothing(workshop: Workshop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = workshop.trainer(url, rollout__connect_deadline_s=0.5).wait()
    assert ended.code == 1
    assert (
        ended.errors.splitlines()[-1]
        == f"error: rollout service at {url} not ready after 0.5 s: ReadTimeout: timed out"
    )


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", '{"model_type": "qwen2", "num_hidden_layers": 3, "layer_types": []}', "no tokenizer: `num_hi"),
        ("tokenizer.json", "", "no tokenizer: "),
        ("model.safetensors", "", "Error while deserializing header"),
    ],
)
def test_damaged_model(file: str, content: str, reason: str, workshop: Workshop, service: ServiceProgram) -> None:
    model = changed_model(workshop.folder)
    (model / file).write_text(content)
    line = refusal(workshop, service, model__path=model)
    assert line.startswith(f"error: model.path: {model}: {reason}")


def test_other_server_at_the_url(workshop: Workshop, service: ServiceProgram) -> None:
    ended = workshop.trainer(f"{service.url}/v1", rollout__connect_deadline_s=1.0).wait()
    assert ended.code == 1
    assert ended.errors == f"error: rollout service at {service.url}/v1: /v1/ready is no route of this service\n"


def test_resume_without_a_whole_checkpoint(workshop: Workshop, service: ServiceProgram, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step-000001").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    ended = workshop.trainer(service.url, f"--resume={run}").wait()
    assert ended.code == 2
    assert ended.errors.splitlines()[-1] == f"error: --resume: {run} holds no whole checkpoint"
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_run_in_a_folder_that_holds_one(workshop: Workshop) -> None:
    run = workshop.runs / "mine"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    ended = workshop.trainer(NO_SERVICE, run__name="mine").wait()
    assert ended.code == 2
    assert ended.errors == (
        f"error: run.name: {run} holds a run already; go on with --resume {run} or choose another name\n"
    )
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_no_recipe(workshop: Workshop) -> None:
    ended = workshop.trainer(NO_SERVICE, f"--config={ROOT}/no/such.toml").wait()
    assert (ended.code, ended.errors) == (2, f"error: config file {ROOT}/no/such.toml: No such file or directory\n")
