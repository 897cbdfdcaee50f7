"""One answer out of the replies of all tensor-parallel ranks.

Regions that several ranks hold are counted once and must agree. Knows replies as plain values; imports no vLLM.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashrl_rollout.engine import CopiesDifferError, EngineDeadError, EngineError
from flashrl_wire.digest import PartDigest
from flashrl_wire.layout import TensorSpec, WeightLayout

Reply = Mapping[str, Any]


def check(replies: Iterable[Reply]) -> None:
    """Raise EngineError for a reply that is an error, EngineDeadError where a rank's weights are lost."""
    errors = [reply for reply in replies if "error" in reply]
    for reply in sorted(errors, key=lambda reply: "fatal" not in reply):
        raise (EngineDeadError if "fatal" in reply else EngineError)(str(reply["error"]))


def layout(replies: Sequence[Reply]) -> WeightLayout:
    """The layout that all ranks agree on; EngineError unless their regions make up every part."""
    layouts = [WeightLayout.of(TensorSpec.model_validate(spec) for spec in reply["tensors"]) for reply in replies]
    if any(other != layouts[0] for other in layouts):
        raise EngineError("the ranks of the engine hold different models")
    for part in layouts[0].parts():
        regions = {key: count for reply in replies for key, count in reply["regions"].get(part.name, {}).items()}
        if sum(regions.values()) != part.numel:
            raise EngineError(f"the engine holds {sum(regions.values())} of the {part.numel} elements of {part.name}")
    return layouts[0]


def digests(replies: Sequence[Reply]) -> dict[str, PartDigest]:
    """Digest, or shift of the digest, of every part; CopiesDifferError where two ranks' copies of a region do."""
    regions: dict[tuple[str, str], str] = {}
    for reply in replies:
        for part, found in reply["digests"].items():
            for key, digest in found.items():
                if regions.setdefault((part, key), digest) != digest:
                    raise CopiesDifferError(f"two ranks hold different copies of {part}")
    total: dict[str, PartDigest] = {}
    for (part, _), digest in regions.items():
        total[part] = total.get(part, PartDigest()) + PartDigest.from_hex(digest)
    return total
