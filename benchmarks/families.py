"""Does every model family start, sample and take a delta in every precision, bit for bit like a fresh start?

    python benchmarks/families.py [--family llama qwen2/fp8 ... | core | others | odd | refused | all]
        [--quantization int8 fp8 none] [--model FOLDER ...] [--json FILE]

For each family (tiny, random; `--model` adds real ones) and precision: an engine started from checkpoint A and taken
to B by a delta, and one started from B. Tokens and log-probs of both must be equal, and those of A others. All of it in
one process, on the device that vLLM finds. A family that has to be refused must be refused in one line. Exit code 1 on
any difference.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiny_models

PRECISIONS = ("int8", "fp8", "none")
METHODS = {"int8": "flashrl_int8", "fp8": "flashrl_fp8"}
PROMPTS = [[7, 19, 222, 30, 15], [300, 1, 2], [5] * 24]
MAX_TOKENS = 16
MAX_MODEL_LEN = 64

Greedy = list[tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Outcome:
    """What one family in one precision showed; `problem` is empty where all is well."""

    family: str
    quantization: str
    tensors: int
    quantized: int
    changed_elements: int
    seconds: float
    refusal: str
    problem: str


def main() -> int:
    """0 where every family does what it should."""
    arguments = _arguments()
    outcomes = []
    print(f"{'family':<20}{'precision':<11}{'tensors':>8}{'quantized':>10}{'changed':>10}{'s':>6}  result", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, precisions, first) in enumerate(_checkpoints(arguments, Path(scratch))):
            second = tiny_models.step_away(first, Path(scratch) / f"{number}-second", seed=2)
            for precision in precisions:
                outcomes.append(outcome(name, precision, first, second, Path(scratch)))
                _show(outcomes[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(found) for found in outcomes], indent=1) + "\n")
    return int(any(found.problem for found in outcomes))


def _arguments() -> argparse.Namespace:
    groups = {
        "core": list(tiny_models.CORE),
        "others": list(tiny_models.OTHERS),
        "odd": list(tiny_models.ODD),
        "refused": list(tiny_models.REFUSED),
        "all": [*tiny_models.CORE, *tiny_models.OTHERS, *tiny_models.ODD, *tiny_models.REFUSED],
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=["all"], metavar="NAME[/PRECISION]")
    parser.add_argument("--quantization", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--model", nargs="+", type=Path, default=[], help="folders of real models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.family = [name for chosen in arguments.family for name in groups.get(chosen, [chosen])]
    for name in arguments.family:
        family, _, precision = name.partition("/")
        if family not in groups["all"] or precision not in (*PRECISIONS, ""):
            parser.error(f"--family: {name} is none of {', '.join([*groups, *groups['all']])}, nor one with /int8")
    return arguments


def _checkpoints(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, list[str], Path]]:
    """Name, precisions and folder of every model that was asked for."""
    for number, chosen in enumerate(arguments.family):
        family, _, precision = chosen.partition("/")
        make = tiny_models.make_odd if family in tiny_models.ODD else tiny_models.make
        yield family, [precision] if precision else arguments.quantization, make(family, scratch / f"{number}-first")
    for folder in arguments.model:
        yield folder.name, arguments.quantization, folder


def outcome(name: str, precision: str, first: Path, second: Path, scratch: Path) -> Outcome:
    """Walk from `first` to `second` and compare with a fresh start."""
    begin = time.monotonic()
    must_be_refused = name in tiny_models.REFUSED
    layout, changed, refusal, problem = None, 0, "", ""
    try:
        layout, changed, problem = walk(precision, first, second, scratch / "staged")
    except ValueError as error:
        refusal = " ".join(str(error).split())
    if bool(refusal) != must_be_refused:
        problem = problem or (f"refused: {refusal}" if refusal else "was not refused")
    return Outcome(
        family=name,
        quantization=precision,
        tensors=len(layout.tensors) if layout else 0,
        quantized=sum(spec.storage != "bf16" for spec in layout.tensors) if layout else 0,
        changed_elements=changed,
        seconds=round(time.monotonic() - begin, 1),
        refusal=refusal,
        problem=problem,
    )


def walk(precision: str, first: Path, second: Path, staged: Path) -> tuple[Any, int, str]:
    """`(layout, changed elements, problem)`; ValueError where the engine refuses the model."""
    from flashrl_rollout import rank_replies, stored_state
    from flashrl_rollout.staged import write_staged
    from flashrl_wire.delta import diff

    with engine(precision, first) as llm:
        layout = rank_replies.layout(_workers(llm, "flashrl_open", str(first)))
        old, new = (stored_state.read_parts(folder, layout) for folder in (first, second))
        if _digests(llm) != stored_state.digests(old):
            return layout, 0, "the digests after loading are not the checkpoint's"
        before = greedy(llm)
        changes = [diff(part.name, old[part.name], new[part.name]) for part in layout.parts()]
        staged.unlink(missing_ok=True)
        update = write_staged(staged, [change for change, _ in filter(None, changes)])
        _workers(llm, "flashrl_prepare", update.path, update.model_dump_json(), None)
        _workers(llm, "flashrl_apply", update.path, update.model_dump_json())
        _workers(llm, "flashrl_keep")
        llm.reset_prefix_cache()
        if _digests(llm) != stored_state.digests(new):
            return layout, 0, "the digests after the delta are not the checkpoint's"
        after = greedy(llm)
    with engine(precision, second) as llm:
        fresh = greedy(llm)
    changed = sum(change.changed for change, _ in filter(None, changes))
    return layout, changed, _difference(before, after, fresh)


def _difference(before: Greedy, after: Greedy, fresh: Greedy) -> str:
    if after == before:
        return "the delta changed no output"
    if after != fresh:
        tokens = sum(ours[0] != theirs[0] for ours, theirs in zip(after, fresh, strict=True))
        logprobs = sum(ours[1] != theirs[1] for ours, theirs in zip(after, fresh, strict=True))
        return f"of {len(fresh)} prompts {tokens} have other tokens and {logprobs} other log-probs than a fresh start"
    return ""


@contextmanager
def engine(precision: str, folder: Path) -> Iterator[Any]:
    """An engine in this process, with nothing in it that costs time at start."""
    from vllm import LLM
    from vllm.platforms import current_platform

    _look_at_the_class_here(folder)
    llm = LLM(
        str(folder),
        quantization=METHODS.get(precision, "flashrl_bf16" if current_platform.is_cpu() else None),
        dtype="bfloat16",
        load_format="safetensors",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=32 << 20,
        gpu_memory_utilization=0.3,  # CUDA: what must be free at start; the cache has its own size
        skip_tokenizer_init=True,
        logprobs_mode="processed_logprobs",
        worker_extension_cls="flashrl_rollout.worker.WorkerExtension",
        additional_config={"flashrl": {"quantize_layers": "all"}},  # on CUDA such small layers would stay bf16
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm  # its clean-up must not come after the next one's start
        gc.collect()


def _look_at_the_class_here(folder: Path) -> None:
    """Spare vLLM the process in which it would look at the model's class: that process imports all of vLLM first."""
    from vllm import ModelRegistry

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    if architecture in ModelRegistry.models:
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def greedy(llm: Any) -> Greedy:
    """Tokens and log-probs of every prompt, one at a time: a batch may change the last bit."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = [llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0] for prompt in PROMPTS]
    return [
        (list(found.token_ids), [at[token].logprob for at, token in zip(found.logprobs, found.token_ids, strict=True)])
        for found in outputs
    ]


def _digests(llm: Any) -> Any:
    from flashrl_rollout import rank_replies

    return rank_replies.digests(_workers(llm, "flashrl_digests"))


def _workers(llm: Any, call: str, *arguments: str | None) -> Any:
    from flashrl_rollout import rank_replies
    from flashrl_rollout.engine import EngineError

    replies = llm.collective_rpc(call, args=arguments)
    try:
        rank_replies.check(replies)
    except EngineError as error:
        raise ValueError(str(error)) from error
    return replies


def _show(found: Outcome) -> None:
    result = found.problem or (f"refused: {found.refusal}" if found.refusal else "identical")
    counts = f"{found.tensors:>8}{found.quantized:>10}{found.changed_elements:>10}{found.seconds:>6}"
    print(f"{found.family:<20}{found.quantization:<11}{counts}  {result}", flush=True)


if __name__ == "__main__":
    # in this process: twelve starts in the time of one
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
