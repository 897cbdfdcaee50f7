"""Runs inside vLLM's workers: this rank's weights, opened as stored parts and called by `vllm_engine`.

Every call takes and gives plain values, and an error comes back as `{"error": ...}`: an exception here would end the
engine. Knows nothing of requests, transfers or versions.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from flashrl_rollout import heap
from flashrl_rollout.background import Background
from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.model_limits import check_supported
from flashrl_rollout.rank_weights import RankWeights
from flashrl_rollout.runtime_weights import Prepared, TakeBackError, as_text
from flashrl_rollout.staged import StagedUpdate, read_staged

Reply = dict[str, Any]
P = ParamSpec("P")

logger = logging.getLogger(__name__)


def _replying(
    call: Callable[Concatenate[Any, P], Reply],
) -> Callable[Concatenate[Any, P], Reply]:
    """Errors as replies: this is the outermost edge of a worker."""

    def replying(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        try:
            with torch.no_grad():
                return call(self, *args, **kwargs)
        except TakeBackError as error:
            return {"error": str(error), "fatal": True}
        except Exception as error:
            return {"error": f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"}

    return replying


class WorkerExtension:
    """Mixed into vLLM's worker class; `flashrl_` keeps its names apart from vLLM's."""

    flashrl: RankWeights
    _flashrl_background: Background
    _flashrl_ahead: "tuple[str, Future[Prepared]] | None" = None

    @_replying
    def flashrl_open(self, folder: str) -> Reply:
        """Find every tensor of the checkpoint in `folder` in this rank's runtime tensors."""
        worker: Any = self
        check_supported(worker.model_config)
        self.flashrl = RankWeights.open(worker.get_model(), Checkpoint(Path(folder)))
        self._flashrl_background = Background(worker.device)
        # vLLM's worker knows it where it has measured what is left of the memory, and nobody else does
        return {**self.flashrl.describe(), "kv_cache_bytes": getattr(worker, "available_kv_cache_memory_bytes", 0)}

    @_replying
    def flashrl_digests(self) -> Reply:
        """Digest of every region, from the runtime tensors."""
        return {"digests": as_text(self.flashrl.weights.digests())}

    @_replying
    def flashrl_prepare(self, path: str, update: str, max_bytes: int | None) -> Reply:
        """Begin to make a staged update, given as JSON, ready to be written; `path` is its file."""
        staged = StagedUpdate.model_validate_json(update)
        weights = self.flashrl.weights
        self._flashrl_ahead = (
            path,
            self._flashrl_background.start(lambda: weights.prepare(read_staged(staged), max_bytes)),
        )
        return {}

    @_replying
    def flashrl_is_prepared(self) -> Reply:
        """Whether that has come to its end, good or bad; with what it adds to the digests where all of it is ready."""
        ahead = None if self._flashrl_ahead is None else self._flashrl_ahead[1]
        if ahead is None or not ahead.done():
            return {"done": ahead is None}
        ready = _prepared(ahead)
        shifts = None if ready is None else ready.shifts
        return {"done": True} if shifts is None else {"done": True, "digests": as_text(shifts)}

    @_replying
    def flashrl_apply(self, path: str, update: str) -> Reply:
        """Write a staged update, given as JSON, from what was made ready of it."""
        ready = self._flashrl_taken(path)
        changes = ready or read_staged(StagedUpdate.model_validate_json(update))
        return {"digests": as_text(self.flashrl.weights.write(changes))}

    @_replying
    def flashrl_apply_prepared(self, path: str) -> Reply:
        """Write what was made ready, all of it, and told by `flashrl_is_prepared`."""
        ready = self._flashrl_taken(path)
        if ready is None or ready.shifts is None:
            raise ValueError("the update was not made ready")
        self.flashrl.weights.write(ready)
        return {"digests": {}}

    def _flashrl_taken(self, path: str) -> Prepared | None:
        """What was made ready of the update in `path`; whatever was is right once only."""
        ahead, self._flashrl_ahead = self._flashrl_ahead, None
        return _prepared(ahead[1]) if ahead is not None and ahead[0] == path else None

    @_replying
    def flashrl_load_checkpoint(self, folder: str) -> Reply:
        """Quantize and write a whole checkpoint."""
        self._flashrl_ahead = None  # made for other old values
        return {"digests": as_text(self.flashrl.load(Checkpoint(Path(folder))))}

    @_replying
    def flashrl_revert(self) -> Reply:
        """Put the old values back."""
        self.flashrl.weights.revert()
        return self.flashrl_done()

    @_replying
    def flashrl_keep(self) -> Reply:
        """Drop the old values."""
        self.flashrl.weights.keep()
        return self.flashrl_done()

    def flashrl_done(self) -> Reply:
        """An update is over."""
        worker: Any = self
        if worker.device.type == "cpu":  # elsewhere the scratch is the device's
            heap.trim()
        return {}


def _prepared(ahead: "Future[Prepared]") -> Prepared | None:
    """What was made ready; None where that failed: there may be room for it in pieces, or else the write says why."""
    try:
        return ahead.result()
    except Exception as error:
        logger.warning("an update could not be made ready ahead of its commit: %s", error)
        return None
