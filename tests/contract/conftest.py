"""Programs that end with their test, and the run that all others are compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.helpers.sync_rig import CONFIG, Fleets, Start, load, starter
from tests.helpers.workshop import Straight, Workshop
from transformers import AutoModelForCausalLM

from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.model import Policy


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    """For one test."""
    workshop = Workshop(tmp_path)
    yield workshop
    workshop.end()


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """All steps in one go."""
    workshop = Workshop(tmp_path_factory.mktemp("straight"))
    try:
        service = workshop.service()
        ended = workshop.trainer(service.url).wait()
        weights = service.weights()
    finally:
        workshop.end()
    return Straight(workshop.run_folder(), ended, weights["digest"], weights["version"])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One rank in this process."""
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trainer and service start from."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def policy(folder: Path, ranks: Ranks) -> Policy:
    """As it was saved."""
    return load(folder, ranks)


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Start:
    """Starts services at version 0, with settings."""
    return starter(folder, tmp_path)


@pytest.fixture
def fleets() -> Iterator[Fleets]:
    """Makes fleets."""
    fleets = Fleets()
    yield fleets
    fleets.end()
