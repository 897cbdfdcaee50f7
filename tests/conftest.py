"""Real data and models for tests that want them; knows where to look, and skips a test where there are none."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def gsm8k_dir() -> Path:
    """Folder with GSM8K's train.jsonl and test.jsonl; FLASHRL_TEST_DATA names the folder that holds `gsm8k`."""
    folder = Path(os.environ.get("FLASHRL_TEST_DATA", BESIDE_THE_CHECKOUT / "data")) / "gsm8k"
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"needs GSM8K in {folder}")
    return folder.resolve()


@pytest.fixture(scope="session")
def model_dir() -> Callable[[str], Path]:
    """`model_dir("smollm2-135m")` is that model's folder; FLASHRL_TEST_MODELS names the folder that holds it."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("FLASHRL_TEST_MODELS", BESIDE_THE_CHECKOUT / "models")) / name
        if not (folder / "config.json").is_file():
            pytest.skip(f"needs a model in {folder}")
        return folder.resolve()

    return find
