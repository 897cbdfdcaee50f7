"""Programs that end with their test, and the run that all others are compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.workshop import Straight, Workshop


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
