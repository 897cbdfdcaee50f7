"""Messages: the documented JSON is understood, and nothing beside it."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from flashrl_wire.errors import ERRORS, NotReadyError, StaleBaseError, WireError, from_body
from flashrl_wire.handshake import mismatch, tokenizer_hash
from flashrl_wire.messages import GenerateRequest, LoadCheckpoint, LoadWeights, Manifest, Sampling, WeightsInfo

MANIFEST = {
    "kind": "delta", "run_id": "r-1", "base_version": 1, "base_digest": "0" * 32, "version": 2, "digest": "f" * 32,
    "layout_hash": "a" * 32, "changed_elements": 1,
    "segments": [{"part": "a", "dtype": "bf16", "encoding": "sparse", "count": 1}],
    "chunks": [
        {"raw_bytes": 4, "wire_bytes": 9, "hash": "0" * 16},
        {"raw_bytes": 2, "wire_bytes": 3, "hash": "1" * 16},
    ],
}  # fmt: skip
LOAD: TypeAdapter[LoadCheckpoint | Manifest] = TypeAdapter(LoadWeights)
INFO = WeightsInfo(
    version=0, digest="", quantization="int8", storage_bytes=1, last_update=None, model="m", layout_hash="l",
    tokenizer_hash="t", vocab_size=5, max_model_len=9, weights_port=1, run_id=None, poisoned=False,
)  # fmt: skip


def test_defaults_are_the_plain_softmax() -> None:
    assert Sampling().model_dump() == {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 256, "seed": None, "stop": [],
    }  # fmt: skip


def test_prompts_keep_their_kind() -> None:
    prompts = ["text", [1, 2], [{"role": "user", "content": "hi"}]]
    assert GenerateRequest.model_validate_json(json.dumps({"prompts": prompts})).prompts == prompts


def test_manifest_counts_its_bytes() -> None:
    manifest = LOAD.validate_python(MANIFEST)
    assert isinstance(manifest, Manifest)
    assert (manifest.wire_bytes, manifest.raw_bytes) == (12, 6)
    assert LOAD.validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize(
    "change",
    [{"kind": "patch"}, {"digest": "F" * 32}, {"digest": "0" * 31}, {"version": 0}, {"base_version": -1}, {"extra": 1},
     {"run_id": ""}, {"run_id": "a/b"}, {"run_id": "x" * 65}, {"changed_elements": -1},
     {"segments": [{"part": "a", "dtype": "bf16", "encoding": "sparse", "count": 0}]},
     {"segments": [{"part": "a" * 513, "dtype": "bf16", "encoding": "sparse", "count": 1}]},
     {"segments": [{"part": "a", "dtype": "fp64", "encoding": "sparse", "count": 1}]},
     {"chunks": [{"raw_bytes": 0, "wire_bytes": 1, "hash": "0" * 16}]},
     {"chunks": [{"raw_bytes": 1, "wire_bytes": 1, "hash": "0"}]}],
)  # fmt: skip
def test_manifest_that_cannot_be(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LOAD.validate_python(MANIFEST | change)


def test_every_error_has_its_own_code_and_comes_back_over_http() -> None:
    assert len(ERRORS) == len(WireError.__subclasses__())
    for code, kind in ERRORS.items():
        sent = kind("what is wrong", version=3)
        found = from_body(kind.status, json.loads(json.dumps(sent.body())))
        assert (type(found), found.message, found.facts, found.code) == (kind, "what is wrong", {"version": 3}, code)


def test_statuses_are_those_of_the_interface() -> None:
    assert {error.status for error in ERRORS.values()} == {400, 401, 403, 404, 405, 409, 413, 422, 429, 500, 503}
    assert (StaleBaseError.status, NotReadyError.status) == (409, 503)


@pytest.mark.parametrize("body", [None, [], "text", {}, {"error": "text"}, {"error": {}}, {"error": {"code": "new"}}])
def test_foreign_bodies_become_a_plain_error(body: object) -> None:
    error = from_body(502, body)
    assert type(error) is WireError
    assert "502" in error.message


def test_handshake_names_what_differs() -> None:
    def check(**changed: object) -> str:
        facts = {"quantization": "int8", "tokenizer": "t", "vocab_size": 5, "layout": "l"} | changed
        return mismatch(INFO, **facts)  # type: ignore[arg-type]

    assert check() == ""
    assert check(quantization="fp8") == "quantization: fp8 here, int8 there"
    assert check(vocab_size=6, layout="k") == "vocabulary size: 6 here, 5 there; weight layout hash: k here, l there"


def test_tokenizer_hash_sees_ids_and_tokens_but_not_their_order() -> None:
    base = tokenizer_hash({"a": 0, "b": 1})
    assert base == tokenizer_hash({"b": 1, "a": 0})
    assert (
        len({base, tokenizer_hash({"a": 1, "b": 0}), tokenizer_hash({"a": 0, "c": 1}), tokenizer_hash({"a": 0})}) == 4
    )
