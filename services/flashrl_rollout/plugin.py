"""vLLM's entry point into this package, called in every process of an engine.

Registers the quantization methods, the weight-transfer backend and, in an engine of ours, the watch over its parent.
Knows nothing of any of them.
"""

import logging
import os
from contextlib import suppress

from flashrl_rollout.parent_watch import WATCH_PARENT, watch_parent


def register() -> None:
    """Called by vLLM through the entry point `vllm.general_plugins`, perhaps more than once."""
    from flashrl_rollout.quantization import register_all  # imports vLLM's layers, which load_general_plugins precedes

    register_all()
    _register_backend()
    if os.environ.get(WATCH_PARENT) == "1":
        watch_parent()
        # vLLM warns, with every start, of schedulers that are not its own; an engine of ours has one
        logging.getLogger("vllm.config.scheduler").addFilter(lambda record: "custom scheduler" not in record.msg)


def _register_backend() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with suppress(ValueError):  # it is there already
        WeightTransferEngineFactory.register_engine(
            "flashrl", "flashrl_rollout.transfer_backend", "FlashrlTransferEngine"
        )
