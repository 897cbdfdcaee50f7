"""What a real engine samples and reports: processed log-probs, end tokens, seeds, cancellation, weight versions."""

import asyncio
import functools
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.real_engine import (
    PROMPTS,
    ROOT,
    TIMEOUT_S,
    Checkpoints,
    LoopThread,
    delta,
    load,
    save_like,
    spans_cover,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashrl_rollout import stored_state
from flashrl_rollout.engine import Engine, EngineCompletion
from flashrl_wire.messages import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

END = 0
PROMPT = "Ann has 3 apples and buys 4 more. How many apples does she have?"
LONG = Sampling(temperature=2.0, max_tokens=250, seed=11)


@functools.cache
def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _logprobs(folder: Path, completion: EngineCompletion, prompt: list[int], temperature: float) -> Tensor:
    """The log-probability of every token under a checkpoint, by a plain forward pass in fp32."""
    with torch.no_grad():
        logits = _model(folder)(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    table = torch.log_softmax(logits / temperature, dim=-1)
    return table.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def _error(found: list[float], expected: Tensor) -> float:
    return float((torch.tensor(found) - expected).abs().mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logprobs_are_those_of_the_tempered_distribution(
    none_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=40, seed=5)
    prompt = none_engine.encode(PROMPT)
    for completion in loop.run(none_engine.generate("r", prompt, 4, sampling, 0)):
        expected = _logprobs(checkpoints.first, completion, prompt, temperature)
        # bf16 against fp32: a token between two near-equal choices may be far off, on some processors more
        assert _error(completion.logprobs, expected) < 0.08
        assert float((torch.tensor(completion.logprobs) - expected).abs().median()) < 0.01
        assert _error(completion.logprobs, _logprobs(checkpoints.first, completion, prompt, 3 - temperature)) > 0.1


def test_int8_logprobs_are_near_those_of_the_full_weights(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints
) -> None:
    prompt = int8_engine.encode(PROMPT)
    for completion in loop.run(int8_engine.generate("r", prompt, 4, Sampling(max_tokens=40, seed=5), 0)):
        assert 1e-4 < _error(completion.logprobs, _logprobs(checkpoints.first, completion, prompt, 1.0)) < 0.2


def test_the_end_token_is_reported_and_not_shown(int8_engine: Engine, loop: LoopThread) -> None:
    prompt = int8_engine.encode(PROMPT)
    found = loop.run(int8_engine.generate("r", prompt, 8, Sampling(max_tokens=120, seed=1), 0))
    ended = [completion for completion in found if completion.finish_reason == "stop"]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] == END
        assert END not in completion.token_ids[:-1]
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.text
        assert "<" not in completion.text


def test_stop_strings_end_the_text_but_keep_their_tokens(int8_engine: Engine, loop: LoopThread) -> None:
    prompt = int8_engine.encode(PROMPT)
    sampling = Sampling(temperature=0, max_tokens=60)
    (whole,) = loop.run(int8_engine.generate("r", prompt, 1, sampling, 0))
    stop = whole.text[len(whole.text) // 2 :][:2]
    (cut,) = loop.run(int8_engine.generate("r", prompt, 1, sampling.model_copy(update={"stop": [stop]}), 0))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)
    assert len(cut.logprobs) == len(cut.token_ids)
    first = sampling.model_copy(update={"stop": [whole.text[0]]})
    (empty,) = loop.run(int8_engine.generate("r", prompt, 1, first, 0))
    assert (empty.text, len(empty.token_ids)) == ("", 1)


def test_top_logprobs_are_a_sorted_head_of_the_distribution(int8_engine: Engine, loop: LoopThread) -> None:
    (completion,) = loop.run(int8_engine.generate("r", PROMPTS[0], 1, Sampling(temperature=0, max_tokens=5), 3))
    assert completion.top_logprobs is not None
    for token, logprob, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True):
        assert max(top, key=lambda candidate: top[candidate]) == token
        assert top[token] == pytest.approx(logprob)
        assert len(top) == 3
        assert sum(map(math.exp, top.values())) <= 1.0001
    narrow = Sampling(top_k=2, max_tokens=5, seed=3)
    (completion,) = loop.run(int8_engine.generate("r", PROMPTS[0], 1, narrow, 5))
    assert completion.top_logprobs is not None
    assert all(len(top) == 2 for top in completion.top_logprobs)
    assert all(sum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-4) for top in completion.top_logprobs)


def test_sample_i_is_drawn_with_seed_plus_i(int8_engine: Engine, loop: LoopThread) -> None:
    three = loop.run(int8_engine.generate("r", PROMPTS[0], 3, Sampling(max_tokens=20, seed=40), 0))
    (second,) = loop.run(int8_engine.generate("r", PROMPTS[0], 1, Sampling(max_tokens=20, seed=41), 0))
    assert three[1].token_ids == second.token_ids
    assert len({tuple(completion.token_ids) for completion in three}) > 1


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty"), ([512], "vocab"), ([1] * 321, r"320|model length|context")]
)
def test_prompts_the_model_cannot_take(int8_engine: Engine, loop: LoopThread, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.run(int8_engine.generate("r", prompt, 1, Sampling(max_tokens=2), 0))
    assert int8_engine.is_alive


def test_a_temperature_that_vllm_does_not_take(int8_engine: Engine, loop: LoopThread) -> None:
    with pytest.raises(ValueError, match="temperature"):
        loop.run(int8_engine.generate("r", [1], 1, Sampling(temperature=2.5), 0))


def test_facts_and_text(int8_engine: Engine) -> None:
    info = int8_engine.info
    assert (info.quantization, info.vocab_size, info.max_model_len) == ("int8", 512, 320)
    assert info.model == str(ROOT / "examples" / "tiny_arith" / "model")
    assert len(info.tokenizer_hash) == 32
    assert int8_engine.encode("7") == int8_engine.encode("7")[-1:]
    with pytest.raises(ValueError, match="chat_template"):  # this model is none for chats
        int8_engine.encode([{"role": "user", "content": PROMPT}])


@pytest.fixture(scope="module")
def flat(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token is nearly uniform over 512: it seldom ends early, and it is nothing like the others."""
    tensors = load_file(checkpoints.first / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0.02
    return save_like(checkpoints.first, tmp_path_factory.mktemp("flat") / "model", tensors)


@asynccontextmanager
async def _weights(engine: Engine, folder: Path, afterwards: Path) -> AsyncIterator[None]:
    await load(engine, folder, 30)
    try:
        yield
    finally:
        await load(engine, afterwards, 50)


async def _running(engine: Engine, count: int, task: asyncio.Task[list[EngineCompletion]]) -> None:
    """Return once `count` sequences of `task` are running."""
    deadline = time.monotonic() + TIMEOUT_S
    while (await engine.stats()).running != count:
        assert time.monotonic() < deadline
        assert task.cancelled() or not task.done()
        await asyncio.sleep(0.005)


def test_cancelling_frees_the_sequences(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, flat: Path
) -> None:
    async def cancel() -> None:
        async with _weights(int8_engine, flat, checkpoints.first):
            task = asyncio.create_task(int8_engine.generate("r", PROMPTS[1], 6, LONG, 0))
            await _running(int8_engine, 6, task)
            task.cancel()
            await asyncio.wait({task})
            await _running(int8_engine, 0, task)

    loop.run(cancel())


def test_draining_past_its_deadline_goes_on(
    int8_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, flat: Path
) -> None:
    async def drain() -> list[EngineCompletion]:
        async with _weights(int8_engine, flat, checkpoints.first):
            task = asyncio.create_task(int8_engine.generate("r", PROMPTS[1], 4, LONG, 0))
            await _running(int8_engine, 4, task)
            with pytest.raises(TimeoutError, match=r"still running after 0\.05 s"):
                await int8_engine.pause("drain", 0.05)
            found = await task
            await int8_engine.pause("drain", 30)
            await int8_engine.resume()
            return found

    assert max(len(completion.token_ids) for completion in loop.run(drain())) > 100


def test_every_token_belongs_to_the_weights_that_drew_it(
    none_engine: Engine, loop: LoopThread, checkpoints: Checkpoints, flat: Path, tmp_path: Path
) -> None:
    """Freeze running sequences, replace the weights, go on: the log-probs on both sides of a boundary tell."""

    async def update_under_way() -> list[EngineCompletion]:
        layout = await none_engine.layout()
        old, new = (stored_state.read_parts(folder, layout) for folder in (flat, checkpoints.third))
        async with _weights(none_engine, flat, checkpoints.first):
            task = asyncio.create_task(none_engine.generate("r", PROMPTS[1], 8, LONG, 0))
            await _running(none_engine, 8, task)
            await none_engine.generate("clock", PROMPTS[2], 1, LONG.model_copy(update={"max_tokens": 30}), 0)
            await none_engine.pause("keep", 30)
            await none_engine.apply(delta(layout, old, new, tmp_path / "staged"))
            await none_engine.adopt(40)
            await none_engine.resume()
            await none_engine.keep()
            return await task

    found = loop.run(update_under_way())
    assert all(spans_cover(completion) for completion in found)
    crossed = [completion for completion in found if len(completion.weight_versions) == 2]
    assert crossed
    for completion in crossed:
        (_, _, boundary), (version, _, _) = completion.weight_versions
        assert version == 40
        before = _logprobs(flat, completion, PROMPTS[1], 2.0)
        after = _logprobs(checkpoints.third, completion, PROMPTS[1], 2.0)
        assert completion.logprobs[:boundary] == pytest.approx(before[:boundary].tolist(), abs=0.1)
        assert completion.logprobs[boundary:] == pytest.approx(after[boundary:].tolist(), abs=0.5)
        assert boundary > 20
        assert _error(completion.logprobs[:boundary], after[:boundary]) > 0.5
        assert _error(completion.logprobs[boundary:], before[boundary:]) > 0.5
