"""A model of a few hundred weights, services that hold it, and a trainer's sync with any number of them.

Knows how to build both sides; knows nothing of what is tested.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.helpers.live_service import LiveService, live
from transformers import Qwen2Config

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineInfo
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.scripted_folder import folder_layout
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.keeper import Keeper
from flashrl_trainer.model import Policy, load_policy
from flashrl_trainer.publisher import Publisher
from flashrl_trainer.replica import Replica
from flashrl_trainer.rollout_client import RolloutClient
from flashrl_trainer.weight_sync import Identity, WeightSync

CONFIG = Qwen2Config(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
INFO = EngineInfo("scripted", "int8", 13, 128, "0" * 32)
IDENTITY = Identity("int8", "0" * 32, 13)
RUN = "run-a"

Start = Callable[..., AbstractContextManager[LiveService]]


def starter(folder: Path, stage_root: Path) -> Start:
    """A function that starts services at version 0 with the weights of `folder`, with settings."""

    def start(engine: type[ScriptedEngine] = ScriptedEngine, **settings: Any) -> AbstractContextManager[LiveService]:
        layout = folder_layout(folder, "int8")

        def make() -> ScriptedEngine:
            return engine(layout, stored_state.read_parts(folder, layout), INFO)

        return live(make, stage_root, **settings)

    return start


def load(folder: Path, ranks: Ranks) -> Policy:
    """The model of `folder` in fp32."""
    return load_policy(
        str(folder), ranks, compute_dtype="float32", checkpointing=False, temperature=1.0, chunk_tokens=8
    )


@dataclass
class Fleets:
    """Fleets with their keepers; `end` ends those, or they would go on asking for services on ports of other tests."""

    made: list[Fleet] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def of(self, urls: Sequence[str], run_id: str = RUN, *, straggler_s: float = 5.0, deadline_s: float = 5.0) -> Fleet:
        """Of the replicas at `urls`; where that is a list, they may be changed while it lasts."""

        def make(url: str) -> Replica:
            client = RolloutClient(url, None, request_timeout_s=10, retry_s=1)
            return Replica(client, Publisher(client, run_id, deadline_s=10, keys=None))

        fleet = Fleet(map(make, urls), deadline_s=deadline_s, straggler_s=straggler_s, note=self.said.append)
        self.made.append(fleet)
        Keeper(fleet, lambda: list(urls), make).start()
        return fleet

    def end(self) -> None:
        """Look after none any more."""
        for fleet in self.made:
            fleet.stopping.set()


def connected(
    fleet: Fleet,
    policy: Policy,
    ranks: Ranks,
    *,
    version: int = 0,
    fresh: bool = True,
    run_id: str = RUN,
    ring_bytes: int = 0,
) -> WeightSync:
    """A sync that has shaken hands."""
    sync = WeightSync(fleet, run_id, ranks, block_bytes=1000, ring_bytes=ring_bytes)
    sync.connect(policy, IDENTITY, version, fresh=fresh)
    return sync


def train(policy: Policy, seed: int, share: float = 0.1) -> None:
    """Move that share of the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]
            local.add_(0.1 * (torch.rand(local.shape, generator=generator) < share))


def held(service: LiveService) -> tuple[int, str, bool]:
    """Version, digest of what the engine really holds, and whether it is poisoned."""
    weights = service.service.require().weights
    return (
        weights.version,
        stored_state.combined(weights.layout, stored_state.digests(service.engine.parts)),
        weights.poisoned,
    )
