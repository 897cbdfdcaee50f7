"""What the deployment's files say without being run: that they fit together, and what they never allow."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashrl_rollout.config import load_config as load_rollout
from flashrl_trainer.config import load_config as load_trainer
from flashrl_trainer.metric_rows import METRIC_KEYS

ROOT = Path(__file__).resolve().parents[2]
ENV_FILES = sorted(ROOT.glob(".env.*"))
COMPOSE = [ROOT / "compose.yaml", ROOT / "compose.gpu.yaml"]


def compose(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text())
    assert isinstance(content, dict)
    return content


def variables(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("file", ENV_FILES, ids=lambda file: file.name)
def test_an_env_file_names_a_recipe_and_settings_that_fit_it(file: Path) -> None:
    values = variables(file)
    known = set(load_rollout(None, {"FLASHRL_ROLLOUT_MODEL": "M"}, {}).model_dump())
    environ = {k: v for k, v in values.items() if k.removeprefix("FLASHRL_ROLLOUT_").lower() in known}
    service, trainer = load_rollout(None, environ, {}), load_trainer(ROOT / values["FLASHRL_RECIPE"], [], {})
    assert (service.model, service.quantization) == (trainer.model.path, trainer.rollout.quantization)
    assert service.max_model_len == trainer.data.max_prompt_tokens + trainer.sampling.max_tokens
    assert service.tensor_parallel_size == len(values["FLASHRL_ROLLOUT_GPUS"].split(","))
    assert int(values["FLASHRL_PROCESSES"]) == len(values["FLASHRL_TRAINER_GPUS"].split(","))


def test_every_variable_of_an_env_file_is_read_and_every_one_read_is_documented() -> None:
    read = set(re.findall(r"\$\{(\w+)[:}]", "".join(file.read_text() for file in COMPOSE)))
    given = set().union(*(variables(file) for file in ENV_FILES))
    assert given <= read
    documented = (ROOT / "docs" / "deploying.md").read_text()
    assert [name for name in sorted(read) if f"`{name}`" not in documented] == []


def test_nothing_is_privileged_and_only_loopback_is_published() -> None:
    for name, service in compose(COMPOSE[0])["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "8001" not in str(service.get("ports", [])), name
        assert ("cap_add" in service) == (name == "init"), name
        assert "mem_limit" in service or name == "init", name


def test_images_and_dependencies_have_versions() -> None:
    for name in ("constraints-cpu.txt", "constraints-cuda.txt"):
        lines = (ROOT / "deploy" / "docker" / name).read_text().split()
        assert lines
        assert all(re.fullmatch(r"[\w.\-\[\]]+==[\w.+!]+", line) for line in lines), name
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.M)) == {"python:3.11-slim-bookworm", "runtime"}
    for name, service in compose(COMPOSE[0])["services"].items():
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    text = (ROOT / "deploy" / "observability" / "grafana" / "flashrl.json").read_text()
    asked = {
        name
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"flashrl_\w+", target["expr"])
    }
    trainer = {"flashrl_trainer_" + key.replace("/", "_") for key in METRIC_KEYS}
    documented = set(re.findall(r"`(flashrl_\w+)", (ROOT / "docs" / "running.md").read_text()))
    service = documented | {f"{name}_bucket" for name in documented}
    assert asked - trainer - service == set()
    assert len(asked & trainer) > 15
    assert len(asked & service) > 10
