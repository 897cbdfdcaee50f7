"""A service around the scripted engine inside the test's own event loop: real routes, real sockets, no processes.

Knows how to build one; knows nothing of what is tested.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.helpers.wire_trainer import Update, Wire, WireTrainer, delta_update, snapshot_update

from flashrl_rollout import startup, stored_state
from flashrl_rollout.app import create_app
from flashrl_rollout.assembly import assemble
from flashrl_rollout.config import RolloutConfig
from flashrl_rollout.engine import Engine, EngineInfo
from flashrl_rollout.engine_group import EngineGroup
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.service import Parts, Service
from flashrl_wire.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout.of(
    [
        TensorSpec(name="down.weight", shape=(64, 32), storage="int8_rows"),
        TensorSpec(name="up.weight", shape=(16, 8), storage="fp8_rows"),
        TensorSpec(name="norm.weight", shape=(100,), storage="bf16"),
    ]
)
INFO = EngineInfo(model="scripted", quantization="int8", vocab_size=300, max_model_len=128, tokenizer_hash="0" * 32)


@dataclass(frozen=True)
class Rig:
    """A running service and the ways to reach it."""

    engine: ScriptedEngine
    service: Service
    http: httpx.AsyncClient
    trainer: WireTrainer
    stage_dir: Path
    port: int
    engines: tuple[ScriptedEngine, ...]

    def state(self, seed: int) -> stored_state.Parts:
        """Another stored state for the same layout."""
        return stored_state.random_parts(LAYOUT, seed)

    def current(self) -> stored_state.Parts:
        """A copy of what the engine holds."""
        return {name: values.clone() for name, values in self.engine.parts.items()}

    def few_changes(self) -> stored_state.Parts:
        """The engine's state with five elements changed."""
        new = self.current()
        new["down.weight"][3, 5:8] = new["down.weight"][3, 5:8] ^ 1
        new["down.weight_scale"][3, 0] = 0.5
        new["norm.weight"][99] = 7.0
        return new

    def delta(self, new: stored_state.Parts | None = None) -> Update:
        """From what the engine holds to `new`."""
        return delta_update(LAYOUT, self.current(), new or self.few_changes(), base=self.version)

    def snapshot(self, new: stored_state.Parts) -> Update:
        """Everything of `new`."""
        return snapshot_update(LAYOUT, self.current(), new, base=self.version)

    def staged_files(self) -> list[Path]:
        """What lies in shared memory."""
        return list(self.stage_dir.rglob("*.staged"))

    @property
    def parts(self) -> Parts:
        """The parts of the service."""
        return self.service.require()

    @property
    def version(self) -> int:
        """The version served."""
        return self.parts.weights.version

    async def weights(self) -> dict[str, object]:
        """GET /weights."""
        reply = await self.http.get("/weights")
        return dict(reply.json())

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until a condition of the service holds."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 (production code has no event for it)
                await asyncio.sleep(0.001)

    async def sample(self, prompt: str = "hi", **sampling: object) -> list[int]:
        """Greedy tokens for a prompt."""
        body = {"prompts": [prompt], "sampling": {"temperature": 0, "max_tokens": 8, **sampling}}
        reply = await self.http.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        return list(reply.json()["results"][0]["completions"][0]["token_ids"])


def _engine(token_s: float, layout: WeightLayout) -> ScriptedEngine:
    return ScriptedEngine(layout, stored_state.random_parts(layout, 0), INFO, end_token=None, token_s=token_s)


@asynccontextmanager
async def running(
    stage_root: Path,
    *,
    token: str | None = None,
    token_s: float = 0.0,
    engines: int = 1,
    layout: WeightLayout = LAYOUT,
    **settings: object,
) -> AsyncIterator[Rig]:
    """A service with `settings` on free ports, until the block ends."""
    config = RolloutConfig.model_validate(
        {"model": "scripted", "port": 0, "weights_port": 0, "stage_root": stage_root} | settings
    )
    bound = startup.bind(config, {} if token is None else {"FLASHRL_TOKEN": token})
    bound.receiver.start()
    service = Service()
    scripted = tuple(_engine(token_s, layout) for _ in range(engines))
    engine: Engine = scripted[0] if engines == 1 else await EngineGroup.of(scripted)
    app = create_app(service, token=bound.token, max_body_bytes=config.max_body_mib << 20)
    service.parts = await assemble(config, engine, bound.receiver, bound.stage_dir, service.metrics.count_update)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    wire = Wire(bound.receiver.port)
    async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers, timeout=20) as http:
        try:
            yield Rig(scripted[0], service, http, WireTrainer(http, wire), stage_root, bound.receiver.port, scripted)
        finally:
            wire.close()
            await service.parts.store.close(5.0)
            bound.close()
