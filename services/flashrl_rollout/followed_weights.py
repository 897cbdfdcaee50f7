"""One rank's weights and what is known of all ranks', kept in step without a service above: every rank decides alike.

An update is whole on all ranks or on none. Knows manifests, digests and replies; knows nothing of vLLM or of files.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flashrl_rollout import rank_replies
from flashrl_rollout.engine import EngineError
from flashrl_rollout.manifest_checks import Base, check_manifest
from flashrl_rollout.rank_replies import Reply
from flashrl_rollout.runtime_weights import RuntimeWeights, TakeBackError, as_text
from flashrl_wire.delta import Change
from flashrl_wire.digest import Combiner, PartDigest
from flashrl_wire.errors import DigestMismatchError, WireError
from flashrl_wire.layout import PartSpec
from flashrl_wire.messages import Manifest

Exchange = Callable[[Reply], list[Reply]]
"""Gives this rank's reply to all ranks and returns everybody's, in rank order; called on every rank or on none."""
Read = Callable[[Mapping[str, PartSpec]], Iterable[Change]]
"""The changes of an update, given the parts they are for; may raise as it goes."""


class FollowedWeights:
    """`update` is called with the same manifest on every rank."""

    def __init__(self, description: Reply, weights: RuntimeWeights, exchange: Exchange, max_update_bytes: int) -> None:
        """Version 0 is what the ranks hold now; EngineError where they do not make up one model."""
        self._weights, self._exchange, self._max_update_bytes = weights, exchange, max_update_bytes
        replies = exchange({**description, "digests": as_text(weights.digests())})
        self.layout = rank_replies.layout(replies)
        self.parts = {part.name: part for part in self.layout.parts()}
        self._combiner = Combiner(self.layout.parts())
        self.version = 0
        self._digests = rank_replies.digests(replies)

    @property
    def digest(self) -> str:
        """The combined digest of all ranks' weights."""
        return self._combiner.combine(self._digests)

    def state(self) -> dict[str, Any]:
        """Version, digest and layout, as JSON would have them."""
        tensors = [spec.model_dump(mode="json") for spec in self.layout.tensors]
        return {
            "version": self.version,
            "digest": self.digest,
            "layout_hash": self.layout.hash,
            "tensors": tensors,
        }

    def update(self, manifest: Manifest, read: Read) -> None:
        """Write an update in place and keep it with the manifest's digest; WireError, EngineError: the old weights are.

        TakeBackError: they could not be put back, on this rank or another, and nobody may sample from what is left.
        """
        base = Base(self.version, self.digest, self.layout.hash, self.parts, poisoned=False)
        check_manifest(manifest, base, self._max_update_bytes)
        replies = self._exchange(self._written(read))
        if lost := [reply for reply in replies if "fatal" in reply]:
            raise TakeBackError(str(lost[0]["error"]))
        try:
            digests = self._verified(replies, manifest)
        except (WireError, EngineError):
            self._revert()
            raise
        self._weights.keep()
        self._digests, self.version = digests, manifest.version

    def _written(self, read: Read) -> Reply:
        """This rank's part in it; an error becomes a reply, because the other ranks are waiting for one."""
        try:
            return {"digests": as_text(self._weights.write(read(self.parts)))}
        except TakeBackError as error:
            return {"error": str(error), "fatal": True}
        except Exception as error:  # the outermost edge of a rank: without a reply the others would wait for ever
            is_ours = isinstance(error, ValueError | WireError)
            return {"error": f"{error}" if is_ours else f"{type(error).__name__}: {error}"}

    def _revert(self) -> None:
        try:
            self._weights.revert()
        except RuntimeError as error:
            raise TakeBackError(f"the old values could not be put back: {error}") from error

    def _verified(self, replies: list[Reply], manifest: Manifest) -> dict[str, PartDigest]:
        rank_replies.check(replies)
        shifts = rank_replies.digests(replies)
        digests = self._digests | {name: self._digests[name] + shift for name, shift in shifts.items()}
        found = self._combiner.combine(digests)
        if found != manifest.digest:
            raise DigestMismatchError(f"written weights have digest {found}, declared was {manifest.digest}")
        return digests
