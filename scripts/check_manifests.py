"""`python scripts/check_manifests.py`: holds deploy/kubernetes to the schemas of Kubernetes; a line for each mistake.

Knows files and schemas, both on disk; knows nothing of any cluster.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parent.parent / "deploy" / "kubernetes"
VERSION = "1.31"
"""Of Kubernetes; the fields used are in every later one."""
KUSTOMIZATION = "kustomization.yaml"
FIELDS = {
    *("apiVersion", "kind", "labels", "resources", "configMapGenerator"),
    *("images", "replicas", "patches"),
}


def documents(file: Path) -> Iterator[dict[str, Any]]:
    """What a file describes."""
    yield from (document for document in yaml.safe_load_all(file.read_text()) if document is not None)


def manifest_mistakes(file: Path, *, is_patch: bool) -> Iterator[str]:
    """A line for each thing that the schema does not have. A patch may leave out what its base has."""
    for document in documents(file):
        name = f"{file.parent.name}/{file.name}: {document.get('kind')} {document.get('metadata', {}).get('name')}"
        try:
            kubernetes_validate.validate(document, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            if not (is_patch and error.validator == "required"):
                yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        except (kubernetes_validate.InvalidSchemaError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{name}: {error}"


def kustomization_mistakes(file: Path) -> Iterator[str]:
    """A line for each unknown field, file that is missing, and file beside it that is not named."""
    (content,) = documents(file)
    yield from (f"{file.parent.name}: unknown field {field}" for field in sorted(set(content) - FIELDS))
    named = {*content.get("resources", []), *(patch["path"] for patch in content.get("patches", []))}
    yield from (
        f"{file.parent.name}: there is no {path}" for path in sorted(named) if not (file.parent / path).exists()
    )
    beside = {path.name for path in file.parent.glob("*.yaml")} - {KUSTOMIZATION}
    yield from (f"{file.parent.name}: {path} is not named" for path in sorted(beside - named))


def reference_mistakes(folder: Path) -> Iterator[str]:
    """A line for each ConfigMap that a container of a complete set wants and nothing makes."""
    (content,) = documents(folder / KUSTOMIZATION)
    made = {generator["name"] for generator in content.get("configMapGenerator", [])}
    for file in sorted(folder.glob("*.yaml")):
        for document in documents(file):
            for container in _containers(document):
                wanted = {source["configMapRef"]["name"] for source in container.get("envFrom", [])}
                yield from (f"{file.name}: nothing makes ConfigMap {name}" for name in sorted(wanted - made))


def _containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def mistakes(root: Path) -> list[str]:
    """All of them, over every folder with a kustomization."""
    found: list[str] = []
    for kustomization in sorted(root.glob(f"*/{KUSTOMIZATION}")):
        folder = kustomization.parent
        (content,) = documents(kustomization)
        patches = {patch["path"] for patch in content.get("patches", [])}
        found += kustomization_mistakes(kustomization)
        found += [] if patches else reference_mistakes(folder)
        for file in sorted(set(folder.glob("*.yaml")) - {kustomization}):
            found += manifest_mistakes(file, is_patch=file.name in patches)
    return found


if __name__ == "__main__":
    lines = mistakes(ROOT)
    print("\n".join(lines) or "deploy/kubernetes: valid")
    sys.exit(bool(lines))
