"""The trainer of a load run: deltas of every size, snapshots, checkpoint loads, aborts, damage, broken connections.

Knows the wire; knows nothing of clients. The states it sends are random, but it always knows which one is served.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from benchmarks.soak_clients import Tally, Versions
from tests.helpers.wire_trainer import Update, Wire, delta_update, snapshot_update

from flashrl_rollout import stored_state
from flashrl_rollout.stored_state import Parts
from flashrl_wire.digest import bits
from flashrl_wire.frames import ChunkFrame, Hello, Staged
from flashrl_wire.layout import TensorSpec, WeightLayout

_BLOCK_BYTES = 1 << 18
_LIMIT_S = 150.0


@dataclass
class Updates:
    """What was done, and how long sampling stood still for each commit."""

    done: Counter[str] = field(default_factory=Counter)
    pauses_ms: list[float] = field(default_factory=list)


class Updater:
    """Holds the state that the service serves; `step` changes it in one of many ways."""

    def __init__(
        self, http: httpx.AsyncClient, port: int, layout: WeightLayout, first: Path, versions: Versions, seed: int
    ) -> None:
        self.updates = Updates()
        self._http, self._port, self._layout, self._first = http, port, layout, first
        self._versions, self._random = versions, random.Random(seed)
        self._untried: list[Callable[[], Awaitable[str]]] = [
            self.small, self.empty, self.aborted, self.reconnected, self.stale, self.damaged, self.wrong_digest,
            self.checkpoint, self.snapshot, self.full, self.full,
        ]  # fmt: skip
        self._initial = stored_state.read_parts(first, layout)
        self._state: Parts = self._initial
        self._wire = Wire(port)

    @classmethod
    async def of(cls, http: httpx.AsyncClient, first: Path, versions: Versions, seed: int) -> "Updater":
        """For a service that was started from `first`; AssertionError if it holds anything else."""
        info = (await http.get("/weights")).raise_for_status().json()
        specs = (await http.get("/weights/layout")).raise_for_status().json()
        layout = WeightLayout.of(TensorSpec.model_validate(spec) for spec in specs)
        updater = cls(http, info["weights_port"], layout, first, versions, seed)
        assert updater.digest == info["digest"], "the service does not hold the checkpoint that it was started from"
        versions.digests[0] = updater.digest
        return updater

    @property
    def digest(self) -> str:
        """Of what the service should hold."""
        return self._digest(self._state)

    def _digest(self, state: Parts) -> str:
        return stored_state.combined(self._layout, stored_state.digests(state))

    async def step(self, tally: Tally) -> None:
        """One update or what looks like one; `tally` gets what must not happen."""
        steps: dict[Callable[[], Awaitable[str]], int] = {
            self.small: 8, self.large: 3, self.empty: 2, self.snapshot: 1, self.checkpoint: 1,
            self.aborted: 2, self.wrong_digest: 1, self.damaged: 1, self.reconnected: 2, self.stale: 1,
        }  # fmt: skip
        (step,) = self._random.choices(list(steps), list(steps.values()))
        if self._untried:  # the first phase warms up, so it has to see everything
            step = self._untried.pop()
        try:
            async with asyncio.timeout(_LIMIT_S):
                outcome = await step()
        except (TimeoutError, httpx.HTTPError, AssertionError) as error:
            outcome = f"{type(error).__name__} {error}"
        self.updates.done[step.__name__] += 1
        if outcome:
            tally.problem(f"update {step.__name__}: {outcome}")

    def close(self) -> None:
        """Drop the connection."""
        self._wire.close()

    async def _changed(self, share: float) -> Parts:
        return await asyncio.to_thread(self._change, share)  # clients go on meanwhile

    def _change(self, share: float) -> Parts:
        """The served state with other bits in a share of every part's elements, at least one in all."""
        generator = torch.Generator().manual_seed(self._random.randrange(1 << 31))
        changed = {name: values.clone() for name, values in self._state.items()}
        for values in changed.values():
            hit = torch.rand(values.numel(), generator=generator) < share
            flat = bits(values.view(-1))
            # the lowest bit: a scale or a value moves by next to nothing, and a code by one
            flat[hit] = flat[hit] ^ 1
            if values.dtype == torch.int8:
                values[values == -128] = -127  # a code that no quantizer writes
            if values.dtype == torch.float8_e4m3fn:
                flat[(flat & 0x7F) == 0x7F] ^= 1  # NaN
        return changed

    async def _delta(self, new: Parts) -> Update:
        base = self._versions.latest
        return await asyncio.to_thread(
            delta_update, self._layout, self._state, new, base=base, block_bytes=_BLOCK_BYTES
        )

    async def prepared(self, count: int) -> list[tuple[Update, Parts]]:
        """So many small deltas, one after the other; a trainer of its own makes them elsewhere."""
        return await asyncio.to_thread(self._prepare, count)

    def _prepare(self, count: int) -> list[tuple[Update, Parts]]:
        found, old, served = [], self._state, self._state
        for step in range(count):
            self._state = old
            new = self._change(1e-3)
            update = delta_update(self._layout, old, new, base=self._versions.latest + step, block_bytes=_BLOCK_BYTES)
            found.append((update, new))
            old = new
        self._state = served
        return found

    async def publish(self, update: Update, new: Parts) -> str:
        """Send and commit one; what went wrong, or nothing."""
        return await self._publish(update, new)

    async def small(self) -> str:
        """A delta as of one training step."""
        new = await self._changed(self._random.choice([1e-5, 1e-3, 0.01]))
        return await self._publish(await self._delta(new), new)

    async def large(self) -> str:
        """A delta of much or all."""
        new = await self._changed(self._random.choice([0.2, 1.0]))
        return await self._publish(await self._delta(new), new)

    async def full(self) -> str:
        """A delta of every element."""
        new = await self._changed(1.0)
        return await self._publish(await self._delta(new), new)

    async def empty(self) -> str:
        """A new version of the same weights."""
        return await self._publish(await self._delta(self._state), self._state)

    async def snapshot(self) -> str:
        """Everything, whatever the base."""
        new = await self._changed(0.05)
        base = self._versions.latest
        update = snapshot_update(self._layout, self._state, new, base=base, block_bytes=_BLOCK_BYTES)
        return await self._publish(update, new)

    async def checkpoint(self) -> str:
        """The checkpoint that the service was started from, off its disk."""
        version = self._versions.latest + 1
        self._versions.digests[version] = self._digest(self._initial)
        body = {"kind": "checkpoint", "path": str(self._first.resolve()), "version": version}
        return self._committed(await self._http.post("/load_weights", json=body), self._initial)

    async def aborted(self) -> str:
        """Staged, and then dropped."""
        transfer_id = await self._staged(await self._delta(await self._changed(0.01)))
        replies = [await self._http.delete(f"/load_weights/{transfer_id}") for _ in range(2)]
        return "" if [reply.status_code for reply in replies] == [200, 200] else f"abort: {replies[0].text}"

    async def wrong_digest(self) -> str:
        """Written, found to be something else, and put back."""
        update = (await self._delta(await self._changed(0.01))).declaring(digest="0" * 32)
        reply = await self._commit(await self._staged(update))
        return "" if reply.status_code == 422 else f"{reply.status_code} {reply.text}"

    async def damaged(self) -> str:
        """A chunk that arrives damaged, and again."""
        new = await self._changed(0.05)
        update = await self._delta(new)
        transfer_id = await self._accepted(update)
        broken = bytes([update.payloads[0][0] ^ 1]) + update.payloads[0][1:]
        await self._wire.send(ChunkFrame(transfer_id, 0), broken)
        return await self._publish(update, new, transfer_id)

    async def reconnected(self) -> str:
        """A connection that breaks on the way, and another that begins again."""
        new = await self._changed(0.05)
        update = await self._delta(new)
        transfer_id = await self._accepted(update)
        await self._wire.send(Hello(transfer_id))
        await self._wire.push(transfer_id, update.payloads, range(len(update.payloads) // 2))
        self._wire.close()
        self._wire = Wire(self._port)
        return await self._publish(update, new, transfer_id)

    async def stale(self) -> str:
        """From a version that is not the service's."""
        update = (await self._delta(self._state)).declaring(base_version=self._versions.latest + 7, version=1 << 40)
        reply = await self._http.post("/load_weights", content=update.manifest.model_dump_json())
        return "" if reply.status_code == 409 else f"{reply.status_code} {reply.text}"

    async def _accepted(self, update: Update) -> str:
        reply = await self._http.post("/load_weights", content=update.manifest.model_dump_json())
        assert reply.status_code == 202, reply.text
        return str(reply.json()["transfer_id"])

    async def _staged(self, update: Update, transfer_id: str | None = None) -> str:
        transfer_id = transfer_id or await self._accepted(update)
        await self._wire.send(Hello(transfer_id))
        await self._wire.push(transfer_id, update.payloads)
        outcome = await self._wire.receive_last(transfer_id)
        assert isinstance(outcome, Staged), outcome
        return transfer_id

    async def _publish(self, update: Update, new: Parts, transfer_id: str | None = None) -> str:
        transfer_id = await self._staged(update, transfer_id)
        self._versions.digests[update.manifest.version] = update.manifest.digest  # its tokens may come before the reply
        return self._committed(await self._commit(transfer_id), new)

    async def _commit(self, transfer_id: str) -> httpx.Response:
        return await self._http.post(f"/load_weights/{transfer_id}/commit")

    def _committed(self, reply: httpx.Response, new: Parts) -> str:
        if reply.status_code != 200:
            return f"{reply.status_code} {reply.text}"
        body = reply.json()
        self._state, self._versions.latest = new, body["version"]
        self.updates.pauses_ms.append(body["pause_ms"])
        return "" if body["digest"] == self.digest else f"digest {body['digest']}, should be {self.digest}"


class Pauser:
    """Stops sampling now and then, frozen or drained, and lets it go on."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._http, self._random = http, random.Random(seed)

    async def step(self, tally: Tally) -> None:
        """Pause, wait, resume."""
        mode = self._random.choice(["keep", "drain"])
        try:
            paused = await self._http.post(f"/pause?mode={mode}", timeout=_LIMIT_S)
            await asyncio.sleep(self._random.choice([0.0, 0.1, 1.0]))
        finally:
            resumed = await self._http.post("/resume", timeout=_LIMIT_S)
        self.done[f"{mode} {paused.status_code}"] += 1
        if paused.status_code not in (200, 409) or resumed.status_code != 200:  # 409: not drained in time
            tally.problem(f"pause {mode}: {paused.status_code} {paused.text}, resume: {resumed.status_code}")
