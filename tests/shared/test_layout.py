"""Layouts: parts, order, hashes and the first difference of two."""

import pytest
import xxhash
from pydantic import ValidationError

from flashrl_wire.layout import PartSpec, TensorSpec, WeightLayout, difference

CODES = TensorSpec(name="b.weight", shape=(4, 3), storage="int8_rows")
FLOATS = TensorSpec(name="a.weight", shape=(4, 3), storage="fp8_rows")
NORM = TensorSpec(name="c", shape=(5,), storage="bf16")


def test_parts_and_bytes() -> None:
    layout = WeightLayout.of([NORM, CODES, FLOATS])
    assert list(layout.parts()) == [
        PartSpec("a.weight", "fp8", (4, 3)),
        PartSpec("a.weight_scale", "fp32", (4, 1)),
        PartSpec("b.weight", "int8", (4, 3)),
        PartSpec("b.weight_scale", "fp32", (4, 1)),
        PartSpec("c", "bf16", (5,)),
    ]
    assert layout.num_bytes == 2 * (12 + 16) + 10


def test_hash_ignores_the_order_given_and_nothing_else() -> None:
    layout = WeightLayout.of([CODES, FLOATS, NORM])
    assert layout.hash == WeightLayout.of([NORM, FLOATS, CODES]).hash
    changes = ({"name": "d"}, {"shape": (3, 4)}, {"storage": "bf16"})
    others = [WeightLayout.of([CODES.model_copy(update=change), FLOATS, NORM]) for change in changes]
    assert len({layout.hash, *(other.hash for other in others), WeightLayout.of([CODES, FLOATS]).hash}) == 5


def test_hash_is_that_of_the_canonical_text() -> None:
    text = b'[["b.weight",[4,3],"int8_rows"],["c",[5],"bf16"]]'
    assert WeightLayout.of([NORM, CODES]).hash == xxhash.xxh3_128_hexdigest(text)


def test_name_that_stands_twice() -> None:
    with pytest.raises(ValueError, match=r"tensor b\.weight stands twice"):
        WeightLayout.of([CODES, CODES.model_copy(update={"storage": "bf16"})])


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([CODES], [CODES], ""),
        ([CODES, NORM], [CODES], "c is only in the trainer's model"),
        ([CODES], [CODES, NORM], "c is only in the service's model"),
        (
            [CODES],
            [CODES.model_copy(update={"storage": "bf16"})],
            "b.weight is int8_rows[4, 3] here and bf16[4, 3] there",
        ),
    ],
)
def test_difference_is_one_line(ours: list[TensorSpec], theirs: list[TensorSpec], expected: str) -> None:
    assert difference(WeightLayout.of(ours), WeightLayout.of(theirs)) == expected


def test_unknown_storage_is_refused() -> None:
    with pytest.raises(ValidationError, match="storage"):
        TensorSpec.model_validate({"name": "a", "shape": [1], "storage": "int4"})
