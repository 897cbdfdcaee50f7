"""A model whose head is its embedding: the pair is one array on the wire, under the first name."""

from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file
from tests.faults import served
from tests.faults.conftest import Start
from tests.helpers.real_engine import save_like
from tests.helpers.wire_trainer import delta_update, update_of
from tests.helpers.workshop import MODEL

from flashrl_rollout import stored_state
from flashrl_wire.delta import Change
from flashrl_wire.errors import BadUpdateError
from flashrl_wire.layout import TensorSpec, WeightLayout

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_tied_weights_travel_once(start: Start, tmp_path: Path) -> None:
    service = start(folder=str(MODEL))
    specs = httpx.get(f"{service.url}/weights/layout").raise_for_status().json()
    layout = WeightLayout.of(TensorSpec.model_validate(spec) for spec in specs)
    assert [spec.name for spec in layout.tensors if spec.name in (EMBEDDING, HEAD)] == [EMBEDDING]
    tensors = load_file(MODEL / "model.safetensors")
    tensors[EMBEDDING][5:9] += 0.5
    exported = save_like(MODEL, tmp_path / "exported", tensors)
    old, new = (stored_state.read_parts(folder, layout) for folder in (MODEL, exported))
    update = delta_update(layout, old, new, block_bytes=4096)
    assert [segment.part for segment in update.manifest.segments] == [EMBEDDING]
    assert update.manifest.changed_elements == 4 * 256
    head = update_of([Change(HEAD, new[EMBEDDING].view(-1)[:9])], update)
    with pytest.raises(BadUpdateError, match=f"{HEAD}: no such part"):
        served.publish(service.url, head)
    served.publish(service.url, update)
    fresh = start(folder=str(exported))
    assert (service.weights()["version"], fresh.weights()["version"]) == (1, 0)
    assert service.weights()["digest"] == fresh.weights()["digest"] == update.manifest.digest
    assert served.greedy(service) == served.greedy(fresh)
