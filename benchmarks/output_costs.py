"""What it costs to pass on a drawn token: microseconds of CPU in the engine's process and in the service's.

    python benchmarks/output_costs.py [--sequences 256] [--tokens 1 32]

Packs, unpacks and takes in the outputs of a step as vLLM 0.32 does, with one token a sequence and with many, and times
what holding tokens back costs instead. Needs no GPU and no model; imports vLLM.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from flashrl_rollout.held_outputs import HeldOutputs

_REPEATS = 20


def main() -> None:
    """A table, a row for each number of tokens that go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    print(f"microseconds a token, {args.sequences} sequences, log-probs on\n")
    print("| tokens together | pack (engine) | unpack (service) | take in (service) | hold (engine) |")
    print("|---|---|---|---|---|")
    for tokens in args.tokens:
        costs = [_per_token(measure(args.sequences, tokens), args.sequences * tokens) for measure in _MEASURES]
        print(f"| {tokens} | " + " | ".join(costs) + " |")


def _per_token(times_s: list[float], tokens: int) -> str:
    return f"{sorted(times_s)[len(times_s) // 2] / tokens * 1e6:.2f}"


def outputs(sequences: int, tokens: int) -> list[Any]:
    """One output a sequence, all rows of one array as the engine has them."""
    ids = np.arange(sequences * tokens, dtype=np.int64).reshape(-1, 1) % 50000
    rows = LogprobsLists(ids, np.full(ids.shape, -1.5, np.float32), np.ones(len(ids), np.int64))
    return [
        EngineCoreOutput(str(index), list(range(tokens)), rows.slice_request(index * tokens, tokens))
        for index in range(sequences)
    ]


def _timed(prepare: Callable[[], Any], work: Callable[[Any], Any]) -> list[float]:
    times_s = []
    for _ in range(_REPEATS):
        given = prepare()
        began = time.thread_time()
        work(given)
        times_s.append(time.thread_time() - began)
    return times_s


def pack(sequences: int, tokens: int) -> list[float]:
    """The engine's output thread."""
    encoder = MsgpackEncoder()
    return _timed(lambda: EngineCoreOutputs(outputs=outputs(sequences, tokens)), encoder.encode)


def unpack(sequences: int, tokens: int) -> list[float]:
    """The service's output task."""
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    frames = [bytes(frame) for frame in encoder.encode(EngineCoreOutputs(outputs=outputs(sequences, tokens)))]
    return _timed(lambda: frames, decoder.decode)


def take_in(sequences: int, tokens: int) -> list[float]:
    """The service's output task, statistics included."""
    processor = OutputProcessor(None, log_stats=True)
    for index in range(sequences):
        processor.add_request(_request(str(index)), None)
    processor.process_outputs(outputs(sequences, 1), time.monotonic(), IterationStats(), "0")
    return _timed(
        lambda: outputs(sequences, tokens),
        lambda found: processor.process_outputs(found, time.monotonic(), IterationStats(), "0"),
    )


def hold(sequences: int, tokens: int) -> list[float]:
    """What the engine's scheduler does so that `tokens` go together; nothing for one."""
    if tokens == 1:
        return [0.0]
    held = HeldOutputs(tokens)

    def steps(given: list[list[Any]]) -> None:
        for step in given:
            held.thin(step, lambda request_id: True)

    return _timed(lambda: [outputs(sequences, 1) for _ in range(tokens)], steps)


def _request(request_id: str) -> EngineCoreRequest:
    parameters = SamplingParams(
        logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, max_tokens=1 << 20
    )
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=parameters,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=request_id,
    )


_MEASURES = (pack, unpack, take_in, hold)

if __name__ == "__main__":
    main()
