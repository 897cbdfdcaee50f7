"""vLLM's entry point into this package, called in every process of an engine.

Registers the quantization methods and, in an engine of ours, the watch over its parent. Knows nothing of either.
"""

import os

from flashrl_rollout.parent_watch import WATCH_PARENT, watch_parent


def register() -> None:
    """Called by vLLM through the entry point `vllm.general_plugins`, perhaps more than once."""
    from flashrl_rollout.quantization import register_all  # imports vLLM's layers, which load_general_plugins precedes

    register_all()
    if os.environ.get(WATCH_PARENT) == "1":
        watch_parent()
