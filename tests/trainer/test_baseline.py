"""The sharded baseline: what it encodes, applied to the old stored form, is the new one, on one rank and on three."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from flashrl_trainer.baseline import Baseline, EncodedUpdate
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.model import Policy, load_policy
from flashrl_wire import codec, digest
from flashrl_wire.delta import equal_bits, write
from flashrl_wire.layout import TensorSpec, WeightLayout
from flashrl_wire.quantize import quantize_rows

TIMEOUT_S = 40

# over 3 ranks the 7 rows of gate and up are 3, 3 and 1, and the 4 of k and v are 2, 2 and none
CONFIG = Qwen2Config(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


def layout_of(policy: Policy) -> WeightLayout:
    return WeightLayout.of(
        TensorSpec(name=name, shape=tuple(p.shape), storage="int8_rows" if "_proj.weight" in name else "bf16")
        for name, p in policy.lm.named_parameters()
    )


def stored_form(policy: Policy, layout: WeightLayout) -> dict[str, torch.Tensor]:
    """Whole parts from whole parameters: the definition, with nothing sharded."""
    full = {name: p.detach().full_tensor().to(torch.bfloat16) for name, p in policy.lm.named_parameters()}  # type: ignore[attr-defined]
    parts: dict[str, torch.Tensor] = {}
    for spec in layout.tensors:
        if spec.storage == "bf16":
            parts[spec.name] = full[spec.name]
        else:
            parts[spec.name], parts[spec.name + "_scale"] = quantize_rows(full[spec.name], spec.storage)
    return parts


def applied(update: EncodedUpdate, old: dict[str, torch.Tensor], layout: WeightLayout) -> dict[str, torch.Tensor]:
    parts = {part.name: part for part in layout.parts()}
    raw = b"".join(codec.decompress(c, p) for c, p in zip(update.chunks, update.payloads, strict=True))
    codec.check_segments(update.segments, parts)
    new = {name: values.clone() for name, values in old.items()}
    for change in codec.decode(update.segments, np.frombuffer(raw, np.uint8), parts):
        write(change, new[change.part].view(-1))
    return new


def whole_digest(stored: dict[str, torch.Tensor], layout: WeightLayout) -> str:
    digests = {name: digest.digest_range(values) for name, values in stored.items()}
    return digest.Combiner(layout.parts()).combine(digests)


def scenario(ranks: Ranks, folder: str) -> dict[str, Any]:
    """Capture, change little, delta, change much, delta, nothing, delta, snapshot; collect what was wrong."""
    policy = load_policy(folder, ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8)
    layout = layout_of(policy)
    baseline = Baseline(layout, ranks, block_bytes=100)
    baseline.capture(policy)
    old = stored_form(policy, layout)
    problems = [] if baseline.digest() == whole_digest(old, layout) else ["digest of the captured form"]
    generator = torch.Generator().manual_seed(ranks.rank)
    kinds = []
    for share in (0.02, 1.0, 0.0):
        with torch.no_grad():
            for parameter in policy.parameters():
                local = parameter.to_local()  # type: ignore[attr-defined]
                chosen = torch.rand(local.shape, generator=generator) < share
                local.add_(torch.randn(local.shape, generator=generator) * 0.1 * chosen)
        update = baseline.delta(policy)
        new = stored_form(policy, layout)
        if ranks.is_main:
            result = applied(update, old, layout)
            problems += [f"{share}: {name}" for name in new if not equal_bits(result[name], new[name])]
            kinds.append((update.changed_elements, update.wire_bytes))
        if baseline.digest(update.digests) != whole_digest(new, layout):
            problems.append(f"{share}: digest")
        baseline.advance(update)
        old = new
    snapshot = baseline.snapshot(policy)
    if ranks.is_main:
        blank = {name: torch.zeros_like(values) for name, values in old.items()}
        result = applied(snapshot, blank, layout)
        problems += [f"snapshot: {name}" for name in old if not equal_bits(result[name], old[name])]
        if baseline.digest(snapshot.digests) != whole_digest(old, layout):
            problems.append("snapshot: digest")
    return {"problems": problems, "kinds": kinds, "digest": baseline.digest()}


def on_a_rank(rank: int, world_size: int, port: int, folder: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = start_ranks("cpu", timeout_s=TIMEOUT_S)
    Path(out, f"{rank}.json").write_text(json.dumps(scenario(ranks, folder)))
    stop_ranks()


def on_ranks(world_size: int, port: int, folder: str, out: str) -> int:
    """Runs in a process of its own, this file as its program: forks the ranks, which saves them the imports."""
    children = []
    for rank in range(world_size):
        if (child := os.fork()) == 0:
            on_a_rank(rank, world_size, port, folder, out)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any(codes))


def check(results: list[dict[str, Any]]) -> None:
    """What every rank has to report."""
    assert [result["problems"] for result in results] == [[]] * len(results)
    assert len({result["digest"] for result in results}) == 1
    sparse, dense, empty = results[0]["kinds"]
    assert 0 < sparse[0] < dense[0]
    assert list(empty) == [0, 0]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with random weights."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """A job of one."""
    yield start_ranks("cpu", timeout_s=TIMEOUT_S)
    stop_ranks()


def test_updates_applied_give_the_new_form(model: str, ranks: Ranks) -> None:
    check([scenario(ranks, model)])


def test_updates_of_three_ranks_applied_give_the_new_form(
    model: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    command = [sys.executable, __file__, "3", str(free_port()), model, str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=3 * TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    check([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)])


def test_a_nan_weight_is_named_and_not_published(model: str, ranks: Ranks) -> None:
    policy = load_policy(model, ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8)
    baseline = Baseline(layout_of(policy), ranks, block_bytes=100)
    baseline.capture(policy)
    with torch.no_grad():
        policy.lm.model.layers[1].mlp.up_proj.weight.to_local()[2, 3] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: a weight is NaN or Inf"):
        baseline.delta(policy)


if __name__ == "__main__":
    sys.exit(on_ranks(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
