"""Runs inside vLLM's workers: this rank's weights, opened as stored parts and called by `vllm_engine`.

Every call takes and gives plain values, and an error comes back as `{"error": ...}`: an exception here would end the
engine. Knows nothing of requests, transfers or versions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from flashrl_rollout import heap
from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.model_limits import check_supported
from flashrl_rollout.rank_weights import RankWeights
from flashrl_rollout.runtime_weights import TakeBackError, as_text
from flashrl_rollout.staged import StagedUpdate, read_staged

Reply = dict[str, Any]
P = ParamSpec("P")


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

    @_replying
    def flashrl_open(self, folder: str) -> Reply:
        """Find every tensor of the checkpoint in `folder` in this rank's runtime tensors."""
        worker: Any = self
        check_supported(worker.model_config)
        self.flashrl = RankWeights.open(worker.get_model(), Checkpoint(Path(folder)))
        # vLLM's worker knows it where it has measured what is left of the memory, and nobody else does
        return {**self.flashrl.describe(), "kv_cache_bytes": getattr(worker, "available_kv_cache_memory_bytes", 0)}

    @_replying
    def flashrl_digests(self) -> Reply:
        """Digest of every region, from the runtime tensors."""
        return {"digests": as_text(self.flashrl.weights.digests())}

    @_replying
    def flashrl_apply(self, update: str) -> Reply:
        """Write a staged update, given as JSON."""
        staged = StagedUpdate.model_validate_json(update)
        return {"digests": as_text(self.flashrl.weights.write(read_staged(staged)))}

    @_replying
    def flashrl_load_checkpoint(self, folder: str) -> Reply:
        """Quantize and write a whole checkpoint."""
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
