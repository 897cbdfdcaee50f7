"""What the commands do, once settings are read. Knows the order of a run's start and end."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from flashrl_trainer import assemble, mismatch_bands
from flashrl_trainer.balancer import Balancer
from flashrl_trainer.checkpoint import CheckpointStore
from flashrl_trainer.distributed import Ranks, start_ranks, stop_ranks
from flashrl_trainer.export import export
from flashrl_trainer.exporter import open_mirrors
from flashrl_trainer.fleet import Fleet
from flashrl_trainer.fleet_start import open_fleet
from flashrl_trainer.interrupt import Interrupt, ignore_signals
from flashrl_trainer.metrics import MetricsWriter
from flashrl_trainer.model import dtype_advice
from flashrl_trainer.run_folder import AUTO, choose_folder
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
        if resume not in ("", AUTO) and not resuming and ranks.is_main:
            say(f"--resume: {folder} has no checkpoint yet; it begins anew")
        inputs = assemble.read_inputs(config, say if ranks.is_main else lambda _: None)
        stack.callback(inputs.scorer.close)
        ranks.on_main(inputs.scorer.start)
        run_id = folder.name[:64]
        fleet = _open_fleet(config, ranks, run_id, interrupt)
        writer = stack.enter_context(MetricsWriter(folder, config, active=ranks.is_main, open_mirror=open_mirrors))
        if fleet is not None:
            stack.callback(fleet.close, run_id)
        advice = dtype_advice(ranks.device.type, config.model.compute_dtype)
        if advice and ranks.is_main:
            say(advice)
        policy = assemble.make_policy(config, ranks)
        sync = assemble.make_sync(config, fleet, ranks, run_id, interrupt)
        loop, updater, store = assemble.make_loop(config, ranks, inputs, policy, sync, fleet, writer, interrupt, folder)
        version = 0
        if resuming:
            version = loop.load_state_dict(store.load(_latest(store, folder, ranks), policy, updater.optimizer))
        sync.connect(policy, assemble.identity(config, inputs.tokenizer, policy), version, fresh=not resuming)
        writer.begin(loop.step)
        if fleet is not None:
            fleet.note = writer.note
        loop.run()
        if config.checkpoint.export:
            export(policy, inputs.tokenizer, folder / "export", ranks)
        if ranks.is_main:
            from flashrl_trainer.report import write_report  # matplotlib takes seconds, and only here

            writer.note(f"report: {write_report([folder])}")


def _latest(store: CheckpointStore, folder: Path, ranks: Ranks) -> Path:
    latest = store.latest(say if ranks.is_main else lambda _: None)
    if latest is None:
        raise ValueError(f"--resume: {folder} holds no whole checkpoint")
    return latest


def _start(config: TrainerConfig, stack: ExitStack) -> tuple[Ranks, Interrupt]:
    disable_progress_bar()  # transformers': a bar a rank, in the middle of our lines
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    # a rank waits for rank 0's sampling in a collective, so the limit must be longer than a request's
    limit_s = 4 * config.rollout.request_timeout_s
    ranks = start_ranks(config.model.device, limit_s, config.model.hsdp_replicas)
    stack.callback(stop_ranks)
    interrupt = Interrupt()
    if ranks.is_main:
        interrupt.install()
    else:
        ignore_signals()
    return ranks, interrupt


def _open_fleet(config: TrainerConfig, ranks: Ranks, run_id: str, interrupt: Interrupt) -> Fleet | None:
    """The replicas, on rank 0; a failure is raised everywhere."""
    opened: list[Fleet] = []
    ranks.on_main(lambda: opened.append(open_fleet(config, run_id, interrupt, say)))
    return opened[0] if opened else None


CHECK_PROMPTS = 16
CHECK_UPDATES = 2


def check_sync(config: TrainerConfig) -> None:
    """Two whole steps at lr = 0; a ValueError says what moved and should not have, or the other way round."""
    config = _with(config, "optim", lr=0.0, warmup_steps=0)
    with ExitStack() as stack:
        ranks, interrupt = _start(config, stack)
        inputs = assemble.read_inputs(_with(config, "eval", every=0), say)
        stack.callback(inputs.scorer.close)
        inputs.scorer.start()
        fleet = open_fleet(config, "check-sync", interrupt, say)
        stack.callback(fleet.close, "check-sync")
        policy = assemble.make_policy(config, ranks)
        sync = assemble.make_sync(config, fleet, ranks, "check-sync", interrupt)
        sync.connect(policy, assemble.identity(config, inputs.tokenizer, policy), 0, fresh=False)
        prompts = inputs.prompts.next(CHECK_PROMPTS)
        balancer = assemble.make_balancer(config, fleet)
        collector = assemble.make_collector(config, balancer, inputs.scorer)
        before, version, digest = greedy_tokens(balancer, prompts, config), sync.version, sync.digest
        updater = Updater(policy, ranks, config.algorithm, config.optim)
        for step in range(1, CHECK_UPDATES + 1):
            groups = collector.sample(prompts, sync.version, lambda done, total: None)
            metrics = updater.step(groups, step, sync.version).metrics(ranks) | sync.push(policy)
        ratios = mismatch_bands.measure(policy, ranks, groups, config.optim.max_tokens_per_micro_batch)
        after = greedy_tokens(balancer, prompts, config)
        infos = {replica.url: replica.client.weights() for replica in fleet.replicas}
    for url, info in infos.items():
        if info.version != version + CHECK_UPDATES:
            raise ValueError(f"check-sync: version at {url} is {info.version}, expected {version + CHECK_UPDATES}")
        if info.digest != digest:
            raise ValueError(f"check-sync: digest at {url} moved at lr = 0 from {digest} to {info.digest}")
    if before != after:
        raise ValueError("check-sync: greedy output moved at lr = 0")
    print(
        f"version {version} -> {version + CHECK_UPDATES}, digest {digest} and greedy output of {CHECK_PROMPTS} prompts "
        "unchanged"
    )
    print(
        "mismatch at lr = 0: "
        + ", ".join(
            f"{name.partition('/')[2]} {metrics[name]:.3g}"
            for name in ("mismatch/k3_kl", "mismatch/mean_abs_logprob", "mismatch/max_ratio", "tis/capped_fraction")
        )
    )
    if ratios is not None:
        print(mismatch_bands.describe(ratios))


def greedy_tokens(balancer: Balancer, prompts: Sequence[Prompt], config: TrainerConfig) -> list[list[int]]:
    """Greedy token ids, all prompts in one batch."""
    settings = Sampling(temperature=0.0, max_tokens=min(64, config.sampling.max_tokens))
    reply = balancer.generate([GenerateRequest(prompts=[prompt.prompt for prompt in prompts], sampling=settings)])[0]
    return [result.completions[0].token_ids for result in reply.results]


def _with(config: TrainerConfig, section: str, **values: object) -> TrainerConfig:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})
