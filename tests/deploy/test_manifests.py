"""The checker of the Kubernetes manifests: that ours pass, and that it would say so if they did not."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_manifests", ROOT / "scripts" / "check_manifests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[str, str, str], Path]:
    def edit(file: str, old: str, new: str) -> Path:
        root = tmp_path / "kubernetes"
        shutil.copytree(ROOT / "deploy" / "kubernetes", root)
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))
        return root

    return edit


def test_the_manifests_are_valid(checker: ModuleType) -> None:
    assert checker.mistakes(checker.ROOT) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("base/replicas.yaml", "podManagementPolicy", "podManagmentPolicy", "StatefulSet rollout"),
        ("base/replicas.yaml", "replicas: 2", "replicas: two", "StatefulSet rollout: spec.replicas"),
        ("base/trainer.yaml", "restartPolicy: Never", "restartPolicy: 1", "Job trainer"),
        ("base/trainer.yaml", "trainer-settings", "trainer-setting", "nothing makes ConfigMap trainer-setting"),
        ("base/kustomization.yaml", "  - runs.yaml\n", "", "base: runs.yaml is not named"),
        ("32b/kustomization.yaml", "ranks.yaml", "rank.yaml", "32b: there is no rank.yaml"),
        ("32b/kustomization.yaml", "patches:", "patchs:", "32b: unknown field patchs"),
        ("32b/trainer.yaml", "subdomain", "subdomains", "Job trainer"),
    ],
)
def test_a_mistake_is_named(
    checker: ModuleType, edited: Callable[[str, str, str], Path], file: str, old: str, new: str, line: str
) -> None:
    assert any(line in mistake for mistake in checker.mistakes(edited(file, old, new)))
