"""What a scripted service should serve, and whether it does: version, digest and greedy tokens.

Knows stored states and the routes; knows nothing of what went wrong before it is asked.
"""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import torch
from tests.helpers.forked import LIMIT_S, ServiceProgram
from tests.helpers.outgoing import outgoing
from tests.helpers.wire_trainer import Update, delta_update, snapshot_update

from flashrl_rollout import stored_state
from flashrl_rollout.engine import EngineInfo
from flashrl_rollout.scripted_engine import ScriptedEngine
from flashrl_rollout.scripted_service import MAX_MODEL_LEN, VOCAB_SIZE, scripted_layout
from flashrl_rollout.stored_state import Parts
from flashrl_trainer.publisher import Publisher
from flashrl_trainer.rollout_client import RolloutClient
from flashrl_wire.digest import bits
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import Sampling

LAYOUT = scripted_layout()
RUN = "run-a"
PROMPTS = ("hi", "2+2=")
MAX_TOKENS = 12
_INFO = EngineInfo("scripted", "int8", VOCAB_SIZE, MAX_MODEL_LEN, "0" * 32)


@dataclass(frozen=True)
class Stored:
    """Weights under a number."""

    version: int
    parts: Parts
    layout: WeightLayout = LAYOUT

    @functools.cached_property
    def digest(self) -> str:
        """Of all of them."""
        return stored_state.combined(self.layout, stored_state.digests(self.parts))

    def moved(self, share: float = 0.05) -> "Stored":
        """The next version: other bits in a share of the elements, one of the norm's at least."""
        generator = torch.Generator().manual_seed(self.version + 1)
        parts = {name: values.clone() for name, values in self.parts.items()}
        for values in parts.values():
            flat = bits(values.view(-1))
            hit = torch.rand(flat.shape, generator=generator) < share
            flat[hit] = flat[hit] ^ 1
        parts["norm.weight"][self.version % 64] += 1.0
        return Stored(self.version + 1, parts, self.layout)

    def delta_to(self, new: "Stored") -> Update:
        """What differs."""
        return delta_update(self.layout, self.parts, new.parts, base=self.version, block_bytes=100)

    def snapshot_to(self, new: "Stored") -> Update:
        """All of it."""
        update = snapshot_update(self.layout, self.parts, new.parts, base=self.version)
        return update.declaring(version=new.version)


def first(rows: int = 64) -> Stored:
    """What every scripted service starts with."""
    layout = scripted_layout(rows)
    return Stored(0, stored_state.random_parts(layout, 0), layout)


def assert_serves(service: ServiceProgram, stored: Stored) -> None:
    """These weights and no others, whole: as the digest has it, and as an engine does that was started with them."""
    info = service.weights()
    assert (info["version"], info["digest"], info["poisoned"]) == (stored.version, stored.digest, False)
    assert service.is_ready
    assert greedy(service) == fresh_greedy(stored)


def assert_takes_the_next(service: ServiceProgram, stored: Stored) -> Stored:
    """An update by the real publisher, and serves it; the new state."""
    new = stored.moved()
    publish(service.url, stored.delta_to(new))
    assert_serves(service, new)
    return new


def publish(url: str, update: Update) -> None:
    """As a trainer does."""
    publisher_for(RolloutClient(url, None, request_timeout_s=LIMIT_S, retry_s=5)).publish(outgoing(update))


def publisher_for(client: RolloutClient, *, deadline_s: float = LIMIT_S) -> Publisher:
    """Of the run that all updates here are of."""
    return Publisher(client, RUN, deadline_s=deadline_s, keys=None)


def until_it_writes(service: ServiceProgram) -> None:
    """Return while sampling stands still for a commit."""
    with httpx.Client(base_url=service.url, timeout=LIMIT_S) as http:
        while http.get("/status").raise_for_status().json()["phase"] != "updating":
            pass


def greedy(service: ServiceProgram) -> list[list[int]]:
    """Tokens of each prompt, one after another."""
    sampling = {"temperature": 0, "max_tokens": MAX_TOKENS}
    replies = [service.generate(prompts=[prompt], sampling=sampling) for prompt in PROMPTS]
    return [reply["results"][0]["completions"][0]["token_ids"] for reply in replies]


def fresh_greedy(stored: Stored) -> list[list[int]]:
    """The same of an engine that is started with these weights."""
    with ThreadPoolExecutor(1) as pool:  # a test may have a loop of its own
        return pool.submit(asyncio.run, _fresh_greedy(stored)).result()


async def _fresh_greedy(stored: Stored) -> list[list[int]]:
    engine = ScriptedEngine(stored.layout, stored.parts, _INFO)
    sampling = Sampling(temperature=0, max_tokens=MAX_TOKENS)
    found = [await engine.generate("x", engine.encode(prompt), 1, sampling, 0) for prompt in PROMPTS]
    return [completion.token_ids for (completion,) in found]
