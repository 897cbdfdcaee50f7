"""Builds a run's parts from its configuration, cheapest checks first. Knows every part and runs none of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from flashrl_trainer.ahead import Ahead
from flashrl_trainer.balancer import Balancer
from flashrl_trainer.checkpoint import CheckpointStore
from flashrl_trainer.collect import Collector, Overlong
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.interrupt import Interrupt
from flashrl_trainer.loop import Loop, Parts, Recorder
from flashrl_trainer.model import LOAD_ERRORS, Policy, first_line, load_policy
from flashrl_trainer.prompt_tokens import token_ids
from flashrl_trainer.prompts import PromptStream, RowChecks, load_eval
from flashrl_trainer.rewards import answer_check
from flashrl_trainer.samples import Prompt
from flashrl_trainer.sampling import DynamicSampling
from flashrl_trainer.scoring import Scorer, make_scorer
from flashrl_trainer.settings import TrainerConfig
from flashrl_trainer.source import InTurn, Sampler, Source
from flashrl_trainer.update import Updater
from flashrl_trainer.weight_sync import Identity, WeightSync
from flashrl_wire import messages
from flashrl_wire.handshake import tokenizer_hash


@dataclass(frozen=True)
class Inputs:
    """What is read before anything large is loaded."""

    tokenizer: Any
    scorer: Scorer
    prompts: PromptStream
    eval_prompts: list[Prompt]


def read_inputs(config: TrainerConfig, on_bad_row: Callable[[str], None]) -> Inputs:
    """Tokenizer, data, and a scorer that is yet to be started; ValueError names the setting that is wrong.

    `on_bad_row` hears a line of each row that is skipped, and of rewards that fail.
    """
    scorer = make_scorer(config.data, on_bad_row)
    tokenizer = load_tokenizer(config.model.path)

    checks = RowChecks(lambda prompt: len(token_ids(tokenizer, prompt)), answer_check(config.data.reward), on_bad_row)
    prompts = PromptStream(config.data, checks)
    evaluated = load_eval(config.data, config.eval.problems, checks) if config.eval.every else []
    return Inputs(tokenizer, scorer, prompts, evaluated)


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside a model; ValueError names `model.path`."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise ValueError(f"model.path: {path}: no tokenizer: {first_line(error)}") from None


def make_policy(config: TrainerConfig, ranks: Ranks) -> Policy:
    """The sharded model."""
    torch.manual_seed(config.run.seed)
    return load_policy(
        config.model.path,
        ranks,
        compute_dtype=config.model.compute_dtype,
        checkpointing=config.model.activation_checkpointing,
        temperature=config.sampling.temperature,
        chunk_tokens=config.model.logprob_chunk_tokens,
        compiled=config.model.compile,
    )


def identity(config: TrainerConfig, tokenizer: Any, policy: Policy) -> Identity:
    """What the handshake compares beside the weights."""
    lm: Any = policy.lm
    return Identity(config.rollout.quantization, tokenizer_hash(tokenizer.get_vocab()), lm.config.vocab_size)


def make_sync(
    config: TrainerConfig, fleet: Fleet | None, ranks: Ranks, run_id: str, interrupt: Interrupt
) -> WeightSync:
    """The way to the replicas' weights; the fleet is rank 0's."""
    return WeightSync(
        fleet,
        run_id,
        ranks,
        block_bytes=config.sync.chunk_mib << 20,
        ring_bytes=config.sync.ring_mib << 20,
        interruptible=interrupt.anywhere,
    )


def make_balancer(config: TrainerConfig, fleet: Fleet) -> Balancer:
    """The way to samples."""
    return Balancer(fleet, deadline_s=config.rollout.connect_deadline_s)


def make_collector(config: TrainerConfig, balancer: Balancer | None, scorer: Scorer) -> Collector:
    """Sampling with the settings of training; the balancer is rank 0's."""
    settings = messages.Sampling(
        temperature=config.sampling.temperature, max_tokens=config.sampling.max_tokens, seed=config.run.seed
    )
    overlong = None
    if config.algorithm.overlong == "soft":
        overlong = Overlong(config.algorithm.overlong_buffer, config.algorithm.overlong_factor)
    return Collector(balancer, scorer, settings, config.sampling.samples_per_prompt, overlong)


def make_source(
    config: TrainerConfig, collector: Collector, prompts: PromptStream, balancer: Balancer | None
) -> Source:
    """Sampling in turn with training, or ahead of it."""
    ahead = config.algorithm.max_staleness
    sampling = DynamicSampling(
        config.sampling.prompts_per_step,
        config.sampling.max_attempts,
        max(ahead, config.sampling.surplus_max_age),
        keep_surplus=config.sampling.keep_surplus,
        keep_uniform=not config.sampling.dynamic,
    )
    sampler = Sampler(collector, sampling, prompts)
    if ahead == 0 or balancer is None:
        return InTurn(sampler)
    return Ahead(sampler, ahead, config.run.steps or None, balancer.cancel)


def make_loop(
    config: TrainerConfig,
    ranks: Ranks,
    inputs: Inputs,
    policy: Policy,
    sync: WeightSync,
    fleet: Fleet | None,
    recorder: Recorder,
    interrupt: Interrupt,
    folder: Path,
) -> tuple[Loop, Updater, CheckpointStore]:
    """The loop, and the two parts that resuming needs too."""
    updater = Updater(policy, ranks, config.algorithm, config.optim)
    store = CheckpointStore(folder / "checkpoints", ranks, config.checkpoint.keep)
    prompts = inputs.prompts
    balancer = make_balancer(config, fleet) if fleet else None
    collector = make_collector(config, balancer, inputs.scorer)

    def is_last(step: int) -> bool:
        if config.run.steps:
            return step >= config.run.steps
        return bool(ranks.on_main(lambda: prompts.epoch >= config.run.epochs))

    parts = Parts(
        config=config,
        ranks=ranks,
        policy=policy,
        updater=updater,
        sync=sync,
        collector=collector,
        source=make_source(config, collector, prompts, balancer),
        eval_prompts=inputs.eval_prompts,
        store=store,
        recorder=recorder,
        interrupt=interrupt,
        is_last=is_last,
    )
    return Loop(parts), updater, store
