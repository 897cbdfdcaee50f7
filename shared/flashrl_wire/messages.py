"""Requests and replies of the HTTP plane, as types.

Imports without torch, so that any client can use it; knows nothing of servers, engines or weights' values.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from flashrl_wire import CODEC_VERSION, PROTOCOL_VERSION
from flashrl_wire.layout import PartDtype

Quantization = Literal["int8", "fp8", "none"]
PauseMode = Literal["keep", "drain"]
MAX_PROMPTS = 4096
MAX_SAMPLES = 1024
COLDEST = 0.01
"""The lowest temperature above zero: logits divided by less overflow."""

_INT64 = 1 << 63
TokenId = Annotated[int, Field(ge=0, lt=_INT64)]
Version = Annotated[int, Field(ge=0, lt=_INT64)]


class _FailFast(FailFast):
    """A long list that is wrong throughout would otherwise cost a complaint for every item of it."""

    __hash__ = object.__hash__  # a member of a union must have one


def _whole(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half of a character at {error.start}") from None
    return value


_QUICK = _FailFast()
Text = Annotated[str, AfterValidator(_whole)]
"""Text that can be written as UTF-8; JSON's escapes can also name a lone surrogate."""
Prompt = Text | Annotated[list[TokenId], _QUICK] | Annotated[list[dict[Text, Text]], _QUICK]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _temperature(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"must be 0 (greedy) or at least {COLDEST}")
    return value


class Sampling(_Message):
    """How to draw tokens; the defaults are the plain softmax that importance sampling assumes."""

    temperature: Annotated[float, AfterValidator(_temperature)] = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, lt=1 << 31)
    max_tokens: int = Field(256, ge=1, lt=1 << 31)
    seed: int | None = Field(None, ge=0, lt=_INT64)
    stop: list[Annotated[Text, Field(min_length=1, max_length=256)]] = Field(default_factory=list, max_length=16)


class GenerateRequest(_Message):
    """`{"prompts": ["2+2=", [17, 4], [{"role": "user", "content": "hi"}]], "n": 8}`: text, token ids or chat."""

    prompts: Annotated[list[Prompt], _QUICK] = Field(min_length=1, max_length=MAX_PROMPTS)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    sampling: Sampling = Field(default_factory=Sampling)
    top_logprobs: int = Field(0, ge=0, le=20)
    min_weight_version: Version = 0


class Completion(_Message):
    """One sample; `weight_versions` are spans [version, start, end) over `token_ids`."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_versions: list[tuple[int, int, int]]
    top_logprobs: list[dict[int, float]] | None = None


class GenerateResult(_Message):
    """The n completions of one prompt."""

    prompt_token_ids: list[int]
    completions: list[Completion]


class Usage(_Message):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int


class GenerateResponse(_Message):
    """Results in the order of the prompts."""

    weight_version: int
    quantization: Quantization
    results: list[GenerateResult]
    usage: Usage


class LastUpdate(_Message):
    """What the latest commit did; `seconds` is begin to commit, `pause_ms` gate closed to gate open."""

    kind: Literal["checkpoint", "snapshot", "delta"]
    version: int
    changed_elements: int
    wire_bytes: int
    pause_ms: float
    seconds: float


class WeightsInfo(_Message):
    """`GET /weights`: what a trainer compares before anything else, and what settles a lost reply.

    `quantized_fraction` is the share of all elements that are codes. A trainer ignores facts that it does not know.
    """

    model_config = ConfigDict(extra="ignore")

    version: int
    digest: str
    quantization: Quantization
    storage_bytes: int
    quantized_fraction: float | None = None
    last_update: LastUpdate | None
    protocol: int = PROTOCOL_VERSION
    codec: int = CODEC_VERSION
    model: str
    layout_hash: str
    tokenizer_hash: str
    vocab_size: int
    max_model_len: int
    weights_port: int
    run_id: str | None
    poisoned: bool


class Segment(_Message):
    """Where a part's changes lie in the raw stream: `count` values behind `count` gaps, or a dense range."""

    part: Text = Field(max_length=512)
    dtype: PartDtype
    encoding: Literal["sparse", "dense"]
    start: int = Field(0, ge=0, lt=_INT64)
    count: int = Field(gt=0, lt=_INT64)
    wide: int = Field(0, ge=0, lt=_INT64)


class Chunk(_Message):
    """One compressed block of the raw stream and the xxh3_64 of its wire bytes, hex."""

    raw_bytes: int = Field(gt=0, lt=_INT64)
    wire_bytes: int = Field(gt=0, lt=_INT64)
    hash: str = Field(pattern="^[0-9a-f]{16}$")


Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Manifest(_Message):
    """All that is declared of a delta or snapshot before its bytes: checked and capped before any is accepted."""

    kind: Literal["delta", "snapshot"]
    protocol: int = PROTOCOL_VERSION
    codec: int = CODEC_VERSION
    run_id: str = Field(min_length=1, max_length=64, pattern="^[A-Za-z0-9._-]+$")
    base_version: Version
    base_digest: Digest
    version: int = Field(ge=1, lt=_INT64)
    digest: Digest
    layout_hash: Digest
    changed_elements: int = Field(ge=0, lt=_INT64)
    segments: Annotated[list[Segment], _QUICK]
    chunks: Annotated[list[Chunk], _QUICK]

    @property
    def wire_bytes(self) -> int:
        """Compressed bytes of all chunks."""
        return sum(chunk.wire_bytes for chunk in self.chunks)

    @property
    def raw_bytes(self) -> int:
        """Decompressed bytes of all chunks."""
        return sum(chunk.raw_bytes for chunk in self.chunks)


class LoadCheckpoint(_Message):
    """Load and quantize a Hugging Face folder on the service's disk, and call it `version`."""

    kind: Literal["checkpoint"]
    path: Text = Field(min_length=1, max_length=4096)
    version: Version


LoadWeights = Annotated[LoadCheckpoint | Manifest, Field(discriminator="kind")]


class TransferAccepted(_Message):
    """Begin was accepted: send the chunks to `weights_port` under `transfer_id`, at most `credit_bytes` ahead."""

    transfer_id: str
    weights_port: int
    credit_bytes: int
    deadline_s: float


class CommitReply(_Message):
    """A committed version."""

    version: int
    digest: str
    pause_ms: float
    changed_elements: int
    wire_bytes: int


class PauseReply(_Message):
    """The state after `/pause` or `/resume`."""

    paused: bool


class ErrorDetail(BaseModel):
    """`code` is one of `errors.ERRORS`; beside it stand facts."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class ErrorReply(BaseModel):
    """The body of every reply of 400 and above."""

    error: ErrorDetail
