"""What the commands do, once settings are read. Knows the order of a run's start and end."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from flashrl_trainer import assemble
from flashrl_trainer.checkpoint import CheckpointStore, export
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.exporter import open_mirrors
from flashrl_trainer.interrupt import Interrupt, ignore_signals
from flashrl_trainer.metrics import MetricsWriter
from flashrl_trainer.rollout_client import RolloutClient
from flashrl_trainer.run_folder import choose_folder
from flashrl_trainer.samples import Prompt
from flashrl_trainer.settings import TrainerConfig
from flashrl_trainer.update import Updater
from flashrl_wire.messages import GenerateRequest, Sampling


def say(line: str) -> None:
    """Progress before the run's own display exists; to stderr, so that stdout stays for results."""
    print(line, file=sys.stderr, flush=True)


def train(config: TrainerConfig, stem: str, resume: str) -> None:
    """A run from its first step, or from its last checkpoint, to the report."""
    with ExitStack() as stack:
        ranks, interrupt = _start(config, stack)
        folder, resuming = ranks.on_main(lambda: choose_folder(config.run, stem, resume, datetime.now()))
        inputs = assemble.read_inputs(config, say if ranks.is_main else lambda _: None)
        client = assemble.make_client(config)
        stack.callback(client.close)
        ranks.on_main(lambda: wait_for(client, config, interrupt))
        policy = assemble.make_policy(config, ranks)
        run_id = folder.name[:64]
        sync = assemble.make_sync(config, client, ranks, run_id, interrupt)
        if ranks.is_main:
            stack.callback(client.release, run_id)
        writer = stack.enter_context(MetricsWriter(folder, config, active=ranks.is_main, open_mirror=open_mirrors))
        loop, updater, store = assemble.make_loop(
            config, ranks, inputs, policy, sync, client, writer, interrupt, folder
        )
        version = 0
        if resuming:
            version = loop.load_state_dict(store.load(_latest(store, folder), policy, updater.optimizer))
        sync.connect(policy, assemble.identity(config, inputs.tokenizer, policy), version, fresh=not resuming)
        writer.begin(loop.step)
        loop.run()
        if config.checkpoint.export:
            export(policy, inputs.tokenizer, folder / "export", ranks)
        if ranks.is_main:
            from flashrl_trainer.report import write_report  # matplotlib takes seconds, and only here

            writer.note(f"report: {write_report([folder])}")


def _latest(store: CheckpointStore, folder: Path) -> Path:
    latest = store.latest()
    if latest is None:
        raise ValueError(f"--resume: {folder} holds no whole checkpoint")
    return latest


def _start(config: TrainerConfig, stack: ExitStack) -> tuple[Ranks, Interrupt]:
    disable_progress_bar()  # transformers': a bar a rank, in the middle of our lines
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    # a rank waits for rank 0's sampling in a collective, so the limit must be longer than a request's
    ranks = start_ranks(config.model.device, timeout_s=4 * config.rollout.request_timeout_s)
    stack.callback(stop_ranks)
    interrupt = Interrupt()
    if ranks.is_main:
        interrupt.install()
    else:
        ignore_signals()
    return ranks, interrupt


def wait_for(client: RolloutClient, config: TrainerConfig, interrupt: Interrupt) -> bool:
    """Return once the service is ready; says every ten seconds what it waits for."""
    waited = 0

    def on_wait(state: str) -> None:
        nonlocal waited
        if waited % 10 == 0:
            say(f"waiting for the rollout service at {client.url}: {state}")
        waited += 1

    with interrupt.anywhere():
        client.wait_ready(config.rollout.connect_deadline_s, on_wait)
    return True


def evaluate(config: TrainerConfig, checkpoint: Path | None) -> None:
    """Print accuracy through the service as it is, or after loading `checkpoint` into it."""
    if not config.data.eval:
        raise ValueError("data.eval: needed for an evaluation")
    inputs = assemble.read_inputs(_with(config, "eval", every=max(1, config.eval.every)), say)
    client = assemble.make_client(config)
    interrupt = Interrupt()
    wait_for(client, config, interrupt)
    info = client.weights()
    if checkpoint is not None:
        reply = client.load_checkpoint(str(checkpoint.resolve()), info.version + 1, config.sync.transfer_deadline_s)
        say(f"{checkpoint} is version {reply.version} now, digest {reply.digest}")
    scores = assemble.make_collector(config, client, inputs.reward).evaluate(
        inputs.eval_prompts,
        n=config.eval.samples_per_problem,
        greedy=config.eval.greedy,
        max_tokens=config.eval.max_tokens or config.sampling.max_tokens,
        version=0,
        on_progress=lambda done, total: None,
    )
    greedy = "" if scores.greedy is None else f", greedy {scores.greedy:.1%}"
    print(f"{len(inputs.eval_prompts)} problems: sampled {scores.accuracy:.1%} ({scores.num_samples} samples){greedy}")


CHECK_PROMPTS = 16
CHECK_UPDATES = 2


def check_sync(config: TrainerConfig) -> None:
    """Two whole steps at lr = 0; a ValueError says what moved and should not have, or the other way round."""
    config = _with(config, "optim", lr=0.0, warmup_steps=0)
    with ExitStack() as stack:
        ranks, interrupt = _start(config, stack)
        inputs = assemble.read_inputs(_with(config, "eval", every=0), say)
        client = assemble.make_client(config)
        stack.callback(client.close)
        wait_for(client, config, interrupt)
        policy = assemble.make_policy(config, ranks)
        sync = assemble.make_sync(config, client, ranks, "check-sync", interrupt)
        stack.callback(client.release, "check-sync")
        sync.connect(policy, assemble.identity(config, inputs.tokenizer, policy), 0, fresh=False)
        prompts = inputs.prompts.next(CHECK_PROMPTS)
        collector = assemble.make_collector(config, client, inputs.reward)
        before, version, digest = greedy_tokens(client, prompts, config), sync.version, sync.digest
        updater = Updater(policy, ranks, config.algorithm, config.optim)
        for step in range(1, CHECK_UPDATES + 1):
            groups = collector.sample(prompts, sync.version, lambda done, total: None)
            metrics = updater.step(groups, step).metrics(ranks) | sync.push(policy)
        after = greedy_tokens(client, prompts, config)
        info = client.weights()
    if info.version != version + CHECK_UPDATES:
        raise ValueError(f"check-sync: version is {info.version}, expected {version + CHECK_UPDATES}")
    if info.digest != digest:
        raise ValueError(f"check-sync: digest moved at lr = 0 from {digest} to {info.digest}")
    if before != after:
        raise ValueError("check-sync: greedy output moved at lr = 0")
    print(
        f"version {version} -> {info.version}, digest {digest} and greedy output of {CHECK_PROMPTS} prompts unchanged"
    )
    print(
        "mismatch at lr = 0: "
        + ", ".join(
            f"{name.partition('/')[2]} {metrics[name]:.3g}"
            for name in ("mismatch/k3_kl", "mismatch/mean_abs_logprob", "mismatch/max_ratio", "tis/capped_fraction")
        )
    )


def greedy_tokens(client: RolloutClient, prompts: Sequence[Prompt], config: TrainerConfig) -> list[list[int]]:
    """Greedy token ids, all prompts in one batch."""
    settings = Sampling(temperature=0.0, max_tokens=min(64, config.sampling.max_tokens))
    reply = client.generate([GenerateRequest(prompts=[prompt.prompt for prompt in prompts], sampling=settings)])[0]
    return [result.completions[0].token_ids for result in reply.results]


def _with(config: TrainerConfig, section: str, **values: object) -> TrainerConfig:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})
