"""Keeps the replicas' weights equal to the policy's: handshake at the start, an update a step, repair after a fault.

Runs on every rank; only rank 0 talks. Knows nothing of how samples are used.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from flashrl_trainer.baseline import Baseline
from flashrl_trainer.delta_ring import DeltaRing
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.fleet import Fleet, NeedsSnapshotError
from flashrl_trainer.model import Policy
from flashrl_trainer.outgoing import Held, Outgoing, outgoing
from flashrl_trainer.publisher import Sent
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_wire import handshake
from flashrl_wire.errors import UpdateInProgressError
from flashrl_wire.layout import TensorSpec, WeightLayout, difference
from flashrl_wire.messages import WeightsInfo


class HandshakeError(ValueError):
    """Trainer and service do not fit together; the message says in which respect."""


@dataclass(frozen=True)
class Identity:
    """The trainer's side of the handshake."""

    quantization: str
    tokenizer_hash: str
    vocab_size: int


class WeightSync:
    """One policy and its replicas. `version` is the weight version that is the policy as last pushed."""

    def __init__(
        self,
        fleet: Fleet | None,
        run_id: str,
        ranks: Ranks,
        *,
        block_bytes: int,
        ring_bytes: int,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`fleet` is there on rank 0 only, where alone it is used."""
        self._main_fleet, self._run_id, self._ranks = fleet, run_id, ranks
        self._block_bytes, self._ring_bytes = block_bytes, ring_bytes
        self._interruptible = interruptible
        self._baseline: Baseline | None = None
        self.version = 0
        self.snapshots = 0

    @property
    def _fleet(self) -> Fleet:
        assert self._main_fleet is not None
        return self._main_fleet

    @property
    def digest(self) -> str:
        """Digest of the last pushed policy."""
        assert self._baseline is not None
        return self._baseline.digest()

    def connect(self, policy: Policy, identity: Identity, version: int, *, fresh: bool) -> None:
        """Handshake with every replica that is ready, then bring all of them to the policy's weights.

        `version` is the trainer's last one (0 for a new run). A service at version 0 with other weights than a `fresh`
        run's is a HandshakeError: both loaded something, and not the same thing. UpdateInProgressError where another
        run holds the service.
        """
        infos, layout = self._ranks.on_main(lambda: self._handshake(policy, identity))
        baseline = self._baseline = Baseline(layout, self._ranks, self._block_bytes)
        baseline.capture(policy)
        if fresh:
            self._require_same_start(infos)
        same = [info.version for info in infos.values() if info.digest == baseline.digest() and not info.poisoned]
        served = max(same, default=-1)
        # a resumed run keeps its numbers: under others its surplus samples would be older than they are
        newest = max(info.version for info in infos.values())
        self.version = served if served >= version else version or newest + 1
        self._ranks.on_main(lambda: self._begin(infos, identity))
        if served < version:
            self.repair(policy)
        else:
            self._help(policy)

    def _require_same_start(self, infos: Mapping[str, WeightsInfo]) -> None:
        for url, info in infos.items():
            if info.version == 0 and info.digest != self.digest:
                raise HandshakeError(
                    f"weights: digest {self.digest} here, {info.digest} there: the service at "
                    f"{url} was started from another checkpoint ({info.model})"
                )

    def push(self, policy: Policy, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, float]:
        """Publish the policy's changes as the next version; `sync/*` metrics."""
        assert self._baseline is not None
        start = time.monotonic()
        update = self._baseline.delta(policy)
        delta = outgoing(update, self._baseline, self.version, self.version + 1)
        sent = self._send(delta, on_bytes)
        if sent is None:  # nobody holds the base: they were restarted, or somebody else wrote to them
            update = self._baseline.snapshot(policy)
            sent = self._send(outgoing(update, self._baseline, self.version, self.version + 1), on_bytes)
            assert sent is not None
            if self._ranks.is_main:
                self._fleet.remember(delta)
            self.snapshots += 1
        self._baseline.advance(update)
        self.version += 1
        self._help(policy)
        layout = self._baseline.layout
        return {
            "sync/kind": float(sent[0].kind == "snapshot"),
            "sync/wire_bytes": sent[0].wire_bytes,
            "sync/full_bytes": layout.num_bytes,
            "sync/changed_fraction": sent[0].reply.changed_elements / sum(part.numel for part in layout.parts()),
            "sync/seconds": time.monotonic() - start,
            "sync/pause_ms": max(one.reply.pause_ms for one in sent),
            "sync/replicas": len(sent),
        }

    def repair(self, policy: Policy) -> None:
        """Bring replicas that lost the policy (restarted, or poisoned) back to it, under the same number."""
        assert self._baseline is not None
        self.version = max(1, self.version)
        snapshot = outgoing(self._baseline.snapshot(policy), self._baseline, self.version, self.version)
        if self._send(snapshot) is None:
            raise AssertionError("a snapshot needs no base")
        self.snapshots += 1

    def _help(self, policy: Policy) -> None:
        """Give a snapshot to replicas that deltas cannot bring back, while training goes on."""
        assert self._baseline is not None
        if self._ranks.on_main(lambda: (self._fleet.wants_snapshot,))[0]:
            snapshot = outgoing(self._baseline.snapshot(policy), self._baseline, self.version, self.version)
            if self._ranks.is_main:
                self._fleet.offer(snapshot)
            self.snapshots += 1

    def _send(self, update: Outgoing, on_bytes: Callable[[int], None] = lambda _: None) -> list[Sent] | None:
        """How the replicas took it; None: they need a snapshot."""

        def publish() -> tuple[list[Sent] | None]:
            with self._interruptible():
                try:
                    return (self._fleet.push(update, on_bytes),)
                except NeedsSnapshotError:
                    if update.base is None:
                        raise
                    return (None,)

        return self._ranks.on_main(publish)[0]

    def _begin(self, infos: Mapping[str, WeightsInfo], identity: Identity) -> bool:
        assert self._baseline is not None
        layout = self._baseline.layout
        ring = DeltaRing(layout, self._ring_bytes, self._block_bytes)
        self._fleet.begin(
            Held(self.version, self.digest), ring, lambda url, info: self._check(url, info, identity, layout)
        )
        for replica in self._fleet.replicas:
            if (info := infos.get(replica.url)) and not self._fleet.admit(replica, info):
                self._fleet.fence(replica, f"it holds version {info.version}")
                self._fleet.want_snapshot(replica)
        return True

    def _handshake(self, policy: Policy, identity: Identity) -> tuple[dict[str, WeightsInfo], WeightLayout]:
        """The facts of every replica that is there, and the layout that they share."""
        infos: dict[str, WeightsInfo] = {}
        layout = WeightLayout(())
        for replica in self._fleet.replicas:
            try:
                info = replica.client.weights()
            except ServiceUnreachableError as error:
                self._fleet.fence(replica, str(error), error)
                continue
            if info.layout_hash != layout.hash:  # a second one differs from the first: say in which tensor
                layout = replica.client.layout()
                if problem := difference(_own_layout(policy, layout), layout):
                    raise HandshakeError(f"trainer and service at {replica.url} differ: {problem}")
            self._check(replica.url, info, identity, layout)
            infos[replica.url] = info
        if not infos:
            raise ServiceUnreachableError(self._fleet.describe())
        if len({info.layout_hash for info in infos.values()}) > 1:
            raise HandshakeError(f"the replicas differ in which layers they quantize: {', '.join(infos)}")
        return infos, layout

    def _check(self, url: str, info: WeightsInfo, identity: Identity, layout: WeightLayout) -> None:
        if info.run_id not in (None, self._run_id):
            raise UpdateInProgressError(
                f"the service at {url} follows run {info.run_id}; wait for its end, or, if it has died, "
                f"release it: curl -X DELETE {url}/runs/{info.run_id}",
                run_id=info.run_id,
            )
        problem = handshake.mismatch(
            info,
            quantization=identity.quantization,
            tokenizer=identity.tokenizer_hash,
            vocab_size=identity.vocab_size,
            layout=layout.hash,
        )
        if problem:
            raise HandshakeError(f"trainer and service at {url} differ: {problem}")


def _own_layout(policy: Policy, theirs: WeightLayout) -> WeightLayout:
    """The policy's names and shapes with the service's choice of storage."""
    storage = {spec.name: spec.storage for spec in theirs.tensors}
    return WeightLayout.of(
        TensorSpec(name=name, shape=tuple(parameter.shape), storage=storage.get(name, "bf16"))
        for name, parameter in policy.lm.named_parameters()
    )
