"""Both sides read one folder, however it was saved, and hold the same bits under the same names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import tiny_models

from flashrl_rollout import stored_state
from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_trainer.baseline import Baseline
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.model import Policy, load_policy
from flashrl_wire.layout import TensorSpec, WeightLayout

FAMILIES = [name for name in tiny_models.CORE if name != "gemma2"]  # the trainer refuses its soft caps


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks("cpu", timeout_s=30)
    stop_ranks()


def policy_of(folder: Path, ranks: Ranks) -> Policy:
    return load_policy(
        str(folder), ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=64
    )


def digests(folder: Path, policy: Policy, ranks: Ranks) -> tuple[str, str]:
    """The digest of the policy as the trainer takes it, and that of the folder as the service does."""
    layout = WeightLayout.of(
        TensorSpec(name=name, shape=tuple(values.shape), storage=_storage(name))
        for name, values in policy.lm.named_parameters()
    )
    baseline = Baseline(layout, ranks, 1 << 20)
    baseline.capture(policy)
    return baseline.digest(), stored_state.combined(
        layout, stored_state.digests(stored_state.read_parts(folder, layout))
    )


def _storage(name: str) -> str:
    if not name.endswith("_proj.weight"):
        return "bf16"
    return "fp8_rows" if "down_proj" in name else "int8_rows"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_checkpoints_names_and_bits(family: str, ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny_models.make(family, tmp_path / family)
    policy = policy_of(folder, ranks)
    assert {name for name, _ in policy.lm.named_parameters()} == Checkpoint(folder).shapes.keys()
    trainers, services = digests(folder, policy, ranks)
    assert trainers == services


@pytest.mark.parametrize("kind", tiny_models.ODD)
def test_however_it_was_saved_the_bits_are_the_same(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny_models.make_odd(kind, tmp_path / kind)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (kind == "sharded")
    policy = policy_of(folder, ranks)
    unused = Checkpoint(folder).shapes.keys() - {name for name, _ in policy.lm.named_parameters()}
    assert bool(unused) == (kind in ("extra_tensors", "head_twice"))
    trainers, services = digests(folder, policy, ranks)
    assert trainers == services
