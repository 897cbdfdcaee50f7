"""Loading a checkpoint from the service's disk: only from under the roots, whole, or not at all."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.rig import INFO, LAYOUT, Rig, running

from flashrl_rollout import stored_state
from flashrl_rollout.checkpoint_path import resolve_checkpoint
from flashrl_wire.errors import InvalidFieldError, PathNotAllowedError
from flashrl_wire.layout import TensorSpec, WeightLayout

pytestmark = pytest.mark.anyio


def write_checkpoint(folder: Path, seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {spec.name: torch.randn(spec.shape, generator=generator).bfloat16() for spec in LAYOUT.tensors}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.fixture
async def rooted(tmp_path: Path) -> AsyncIterator[Rig]:
    """A service that may load from tmp_path/served."""
    (tmp_path / "served").mkdir()
    async with running(tmp_path, checkpoint_roots=[tmp_path / "served"]) as rig:
        yield rig


async def load(rig: Rig, path: Path | str, version: int = 5) -> tuple[int, dict[str, object]]:
    reply = await rig.http.post("/load_weights", json={"kind": "checkpoint", "path": str(path), "version": version})
    return reply.status_code, reply.json()


async def test_checkpoint_becomes_the_version_asked_for(rooted: Rig, tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "served" / "step-5")
    status, reply = await load(rooted, tmp_path / "served" / "step-5")
    expected: stored_state.Parts = {}
    for spec in LAYOUT.tensors:
        expected |= stored_state.store(spec, tensors[spec.name])
    assert (status, reply["version"]) == (200, 5)
    assert reply["digest"] == stored_state.combined(LAYOUT, stored_state.digests(expected))
    assert stored_state.digests(rooted.engine.parts) == stored_state.digests(expected)
    assert (await rooted.trainer.publish(rooted.delta())).json()["version"] == 6


async def test_paths_outside_the_roots_are_refused(rooted: Rig, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "outside")
    (tmp_path / "served" / "link").symlink_to(tmp_path / "outside")
    for path in (
        tmp_path / "outside",
        tmp_path / "served" / ".." / "outside",
        tmp_path / "served" / "link",
        "/",
        "/nowhere",
    ):
        status, reply = await load(rooted, path)
        assert (status, reply["error"]["code"]) == (403, "path_not_allowed")  # type: ignore[index]
    assert rooted.version == 0


async def test_folder_that_cannot_be_loaded_changes_nothing(rooted: Rig, tmp_path: Path) -> None:
    before = stored_state.digests(rooted.engine.parts)
    broken = tmp_path / "served" / "broken"
    write_checkpoint(broken)
    save_file({"norm.weight": torch.ones(3)}, broken / "model.safetensors")
    for path, status in ((broken, 422), (tmp_path / "served" / "missing", 422), (f"{tmp_path}/served/\0", 422)):
        assert (await load(rooted, path))[0] == status
    assert stored_state.digests(rooted.engine.parts) == before
    assert len(await rooted.sample()) > 0


TIED = WeightLayout.of(
    [
        TensorSpec(name="embed.weight", shape=(INFO.vocab_size, 4), storage="bf16"),
        TensorSpec(name="norm.weight", shape=(4,), storage="bf16"),
    ]
)


async def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    embedding = torch.arange(INFO.vocab_size * 4).reshape(-1, 4).bfloat16()
    tensors = {"embed.weight": embedding, "norm.weight": torch.ones(4).bfloat16()}
    head = embedding.clone()
    head[-1, -1] += 8  # one step of bf16 at 1,199
    for name, second in (("equal", embedding.clone()), ("other", head)):
        (tmp_path / name).mkdir()
        save_file(tensors | {"lm_head.weight": second}, tmp_path / name / "model.safetensors")
    async with running(tmp_path, checkpoint_roots=[tmp_path], layout=TIED) as rig:
        before = await rig.weights()
        status, reply = await load(rig, tmp_path / "other")
        assert status == 422
        assert "checkpoint: lm_head.weight differs from embed.weight, but this model has one" in str(reply)
        after = await rig.weights()
        assert [after[name] for name in ("version", "digest", "poisoned")] == [0, before["digest"], False]
        assert len(await rig.sample()) == 8
        status, reply = await load(rig, tmp_path / "equal")
        assert (status, reply["version"]) == (200, 5)
        assert torch.equal(rig.engine.parts["embed.weight"], embedding)


async def test_version_must_not_be_negative(rooted: Rig, tmp_path: Path) -> None:
    assert (await load(rooted, tmp_path / "served", version=-1))[0] == 422


async def test_load_waits_for_no_transfer(rooted: Rig, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "served" / "step-5")
    transfer_id = await rooted.trainer.staged(rooted.delta())
    assert (await load(rooted, tmp_path / "served" / "step-5"))[1]["error"]["code"] == "update_in_progress"  # type: ignore[index]
    await rooted.trainer.abort(transfer_id)
    assert (await load(rooted, tmp_path / "served" / "step-5"))[0] == 200


def test_file_that_links_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "served" / "step")
    (tmp_path / "secret.safetensors").write_bytes(b"")
    assert (
        resolve_checkpoint(f"{tmp_path}/served/step", [tmp_path / "served"]) == (tmp_path / "served" / "step").resolve()
    )
    (tmp_path / "served" / "step" / "more.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(PathNotAllowedError):
        resolve_checkpoint(f"{tmp_path}/served/step", [tmp_path / "served"])


def test_roots_that_are_links_themselves_count_as_what_they_point_to(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "real" / "step")
    (tmp_path / "served").symlink_to(tmp_path / "real")
    assert resolve_checkpoint(f"{tmp_path}/served/step", [tmp_path / "served"]).name == "step"


def test_loop_of_links_is_a_bad_field(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises((InvalidFieldError, PathNotAllowedError)):
        resolve_checkpoint(str(tmp_path / "a"), [tmp_path])
