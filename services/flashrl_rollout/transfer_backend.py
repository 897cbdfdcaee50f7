"""Our updates through vLLM's own server: the weight-transfer backend `flashrl`, run inside vLLM's workers.

    VLLM_SERVER_DEV_MODE=1 vllm serve M --quantization flashrl_int8 --weight-transfer-config '{"backend": "flashrl"}'

Knows vLLM's interface for such backends; knows nothing of how updates are encoded or undone.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from torch import distributed
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from flashrl_rollout.checkpoint_reader import Checkpoint
from flashrl_rollout.followed_weights import FollowedWeights
from flashrl_rollout.model_limits import check_supported
from flashrl_rollout.rank_replies import Reply
from flashrl_rollout.rank_weights import RankWeights
from flashrl_rollout.runtime_weights import TakeBackError
from flashrl_rollout.update_file import UpdateFolder
from flashrl_wire.messages import Manifest

STAGE_ROOT = "FLASHRL_ROLLOUT_STAGE_ROOT"
_MAX_UPDATE_BYTES = 64 << 30

logger = logging.getLogger(__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """`{"stage": "my-run"}`: updates will lie in /dev/shm/flashrl-UID-my-run, beside what the engine says it holds."""

    stage: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The name of a file in the stage folder, and the manifest of what is in it (`flashrl_wire.messages.Manifest`)."""

    file: str
    manifest: dict[str, Any]


class FlashrlTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Each `/update_weights` is a whole update, verified and kept, or undone, before it returns; `finish` does nothing.

    An exception out of `finish` would leave vLLM's session open for ever, and vLLM has no route to abort one.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    _folder: UpdateFolder
    _followed: FollowedWeights | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Find every tensor in the engine and say in the stage folder what it holds; version 0, also when repeated."""
        check_supported(self.model_config)
        if self.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size: the flashrl backend follows whole models only")
        root = Path(os.environ.get(STAGE_ROOT, "/dev/shm"))
        self._folder = UpdateFolder(root, init_info.stage)
        with torch.no_grad():
            rank = RankWeights.open(self.model, Checkpoint(self._checkpoint()))
            self._followed = FollowedWeights(rank.describe(), rank.weights, _exchange, _MAX_UPDATE_BYTES)
        self._publish()

    def start_weight_update(self) -> None:
        """Nothing to prepare; an error here leaves vLLM's session closed."""
        if self._followed is None:
            raise ValueError("POST /init_weight_transfer_engine first")

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Write a whole update, or nothing of it; any error: the old weights are in place."""
        assert self._followed is not None
        try:
            manifest = Manifest.model_validate(update_info.manifest)
        except ValidationError as error:
            mistake = error.errors()[0]
            raise ValueError(f"manifest: {'.'.join(map(str, mistake['loc']))}: {mistake['msg']}") from error
        folder, file = self._folder, update_info.file
        try:
            with torch.no_grad():
                self._followed.update(manifest, lambda parts: folder.changes(file, manifest, parts))
        except TakeBackError as error:
            # these weights are of no version, and only the end of this process keeps vLLM from sampling with them
            logger.critical("the engine ends: %s", error)
            os._exit(1)
        self._publish()

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held that has to be given back."""

    def _publish(self) -> None:
        if self._followed is not None and get_tp_group().is_first_rank:
            self._folder.publish(self._followed.state())

    def _checkpoint(self) -> Path:
        """The folder that the engine was loaded from; a model of the hub lies in its cache."""
        model, load = self.model_config.model, self.vllm_config.load_config
        if Path(model).is_dir():
            return Path(model)
        return Path(
            snapshot_download(
                model, revision=self.model_config.revision, cache_dir=load.download_dir, local_files_only=True
            )
        )


def _exchange(reply: Reply) -> list[Reply]:
    """Every tensor-parallel rank's reply."""
    group = get_tp_group()
    if group.world_size == 1:
        return [reply]
    replies: list[Any] = [None] * group.world_size
    distributed.all_gather_object(replies, reply, group=group.cpu_group)
    return replies
