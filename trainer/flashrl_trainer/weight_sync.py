"""Keeps the service's weights equal to the policy's: handshake at the start, an update a step, repair after a fault.

Runs on every rank; only rank 0 talks. Knows nothing of how samples are used.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from flashrl_trainer.baseline import Baseline, EncodedUpdate
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.model import Policy
from flashrl_trainer.publisher import Publisher, Sent
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire import handshake
from flashrl_wire.errors import (
    DrainTimeoutError,
    NotReadyError,
    StaleBaseError,
    UnknownTransferError,
    UpdateInProgressError,
)
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
    """One policy, one replica. `version` is the service's weight version that holds the policy as last pushed."""

    def __init__(
        self,
        client: RolloutClient,
        publisher: Publisher,
        ranks: Ranks,
        *,
        block_bytes: int,
        deadline_s: float,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._client, self._publisher, self._ranks = client, publisher, ranks
        self._block_bytes, self._deadline_s = block_bytes, deadline_s
        self._interruptible = interruptible
        self._baseline: Baseline | None = None
        self.version = 0
        self.snapshots = 0

    @property
    def digest(self) -> str:
        """Digest of the last pushed policy."""
        assert self._baseline is not None
        return self._baseline.digest()

    def connect(self, policy: Policy, identity: Identity, version: int, *, fresh: bool) -> None:
        """Handshake, then bring the service to the policy's weights.

        `version` is the trainer's last one (0 for a new run). A service at version 0 with other weights than a `fresh`
        run's is a HandshakeError: both loaded something, and not the same thing. UpdateInProgressError where another
        run holds the service.
        """
        info, layout = self._ranks.on_main(lambda: self._handshake(policy, identity))
        self._baseline = Baseline(layout, self._ranks, self._block_bytes)
        self._baseline.capture(policy)
        is_same = info.digest == self._baseline.digest()
        if is_same and info.version >= version and not info.poisoned:
            self.version = info.version
            return
        if fresh and info.version == 0 and not is_same:
            raise HandshakeError(
                f"weights: digest {self._baseline.digest()} here, {info.digest} there: the service at "
                f"{self._client.url} was started from another checkpoint ({info.model})"
            )
        # a resumed run keeps its numbers: under others its surplus samples would be older than they are
        self._send(self._baseline.snapshot(policy), version or info.version + 1)

    def push(self, policy: Policy, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, float]:
        """Publish the policy's changes as the next version; `sync/*` metrics."""
        assert self._baseline is not None
        start = time.monotonic()
        version = self.version + 1
        sent = self._send(self._baseline.delta(policy), version, on_bytes)
        if sent is None:  # the service holds another base: it was restarted, or somebody else wrote to it
            sent = self._send(self._baseline.snapshot(policy), version, on_bytes)
            assert sent is not None
        layout = self._baseline.layout
        return {
            "sync/kind": float(sent.kind == "snapshot"),
            "sync/wire_bytes": sent.wire_bytes,
            "sync/full_bytes": layout.num_bytes,
            "sync/changed_fraction": sent.reply.changed_elements / sum(part.numel for part in layout.parts()),
            "sync/seconds": time.monotonic() - start,
            "sync/pause_ms": sent.reply.pause_ms,
        }

    def repair(self, policy: Policy) -> None:
        """Bring a service that lost the policy (it was restarted, or is poisoned) back to it, under the same number."""
        assert self._baseline is not None
        self._send(self._baseline.snapshot(policy), max(1, self.version))

    def _send(
        self, update: EncodedUpdate, version: int, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Sent | None:
        assert self._baseline is not None
        baseline = self._baseline

        def publish() -> tuple[Sent | None]:
            with self._interruptible():
                return (self._publish(update, baseline, version, on_bytes),)

        sent = self._ranks.on_main(publish)[0]
        if sent is not None:
            baseline.advance(update)
            self.version = sent.reply.version
            self.snapshots += sent.kind == "snapshot"
        return sent

    def _publish(
        self, update: EncodedUpdate, baseline: Baseline, version: int, on_bytes: Callable[[int], None]
    ) -> Sent | None:
        try:
            return self._publisher.publish(update, baseline, version, on_bytes)
        except StaleBaseError:
            if update.kind == "snapshot":
                raise
            return None
        except (ServiceUnreachableError, NotReadyError, UnknownTransferError, DrainTimeoutError):
            self._client.wait_ready(self._deadline_s, lambda _: None)  # raises if it does not come back
            info = self._client.weights()
            has_base = (info.version, info.digest) == (self.version, baseline.digest()) and not info.poisoned
            if update.kind == "delta" and not has_base:
                return None
            return self._publisher.publish(update, baseline, version, on_bytes)

    def _handshake(self, policy: Policy, identity: Identity) -> tuple[WeightsInfo, WeightLayout]:
        info, theirs = self._client.weights(), self._client.layout()
        if info.run_id not in (None, self._publisher.run_id):
            raise UpdateInProgressError(
                f"the service at {self._client.url} follows run {info.run_id}; wait for its end, or, if it has died, "
                f"release it: curl -X DELETE {self._client.url}/runs/{info.run_id}"
            )
        ours = _own_layout(policy, theirs)
        problem = difference(ours, theirs) or handshake.mismatch(
            info,
            quantization=identity.quantization,
            tokenizer=identity.tokenizer_hash,
            vocab_size=identity.vocab_size,
            layout=ours.hash,
        )
        if problem:
            raise HandshakeError(f"trainer and service at {self._client.url} differ: {problem}")
        return info, theirs


def _own_layout(policy: Policy, theirs: WeightLayout) -> WeightLayout:
    """The policy's names and shapes with the service's choice of storage."""
    storage = {spec.name: spec.storage for spec in theirs.tensors}
    return WeightLayout.of(
        TensorSpec(name=name, shape=tuple(parameter.shape), storage=storage.get(name, "bf16"))
        for name, parameter in policy.lm.named_parameters()
    )
