"""The training loop: sample, reward, weigh, update, publish; evaluate, record, checkpoint.

Everything it uses is passed in. Knows the order of things and nothing of how any of them is done.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from flashrl_trainer.checkpoint import CheckpointStore
from flashrl_trainer.collect import Collector, Progress
from flashrl_trainer.distributed import Ranks
from flashrl_trainer.eval_scores import EvalScores
from flashrl_trainer.fleet import NeedsSnapshotError
from flashrl_trainer.interrupt import Interrupt
from flashrl_trainer.model import Policy
from flashrl_trainer.optimizer import SkippedStepsError
from flashrl_trainer.rollout_client import ServiceUnreachableError
from flashrl_trainer.samples import Prompt
from flashrl_trainer.sampling import NoMixedGroupsError, SampledStep
from flashrl_trainer.scoring import RewardFailedError
from flashrl_trainer.settings import TrainerConfig
from flashrl_trainer.source import Drawn, Source
from flashrl_trainer.update import Updater
from flashrl_trainer.weight_sync import WeightSync
from flashrl_wire.errors import WireError

Row = dict[str, float | None]
T = TypeVar("T")

STOPS = (
    KeyboardInterrupt,
    ServiceUnreachableError,
    WireError,
    NoMixedGroupsError,
    RewardFailedError,
    SkippedStepsError,
)
"""What ends a run between two movements of the weights, so that it can be gone on with."""

MAX_REPAIRS = 3  # for one request: a service that loses its weights again and again is broken


class Recorder(Protocol):
    """Where a run's numbers go."""

    def phase(self, name: str) -> Progress: ...
    def write(self, row: Row) -> None: ...
    def samples(self, step: int, sampled: SampledStep) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What a loop is made of; `collector`, `source`, `recorder` are used on rank 0 only."""

    config: TrainerConfig
    ranks: Ranks
    policy: Policy
    updater: Updater
    sync: WeightSync
    collector: Collector
    source: Source
    eval_prompts: Sequence[Prompt]
    store: CheckpointStore
    recorder: Recorder
    interrupt: Interrupt
    is_last: Callable[[int], bool]  # whether a step is the last by the run's length


class Loop:
    """A run from `step` (the last one finished) to its end."""

    def __init__(self, parts: Parts) -> None:
        self._p = parts
        self.step = 0
        self._published = True
        self._boundary: dict[str, Any] = {}
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimizer, at a boundary between steps.

        `weight_version` and `digest` are the service's; unless `published`, it has yet to get the checkpoint's weights.
        """
        return {
            "step": self.step,
            "weight_version": self._p.sync.version,
            "digest": self._p.sync.digest,
            "published": self._published,
            **self._p.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Go on from a boundary; the weight version that the policy has there, or would have got next."""
        self.step = state["step"]
        self._p.source.load_state_dict(state)
        return int(state["weight_version"]) + (not state["published"])

    def run(self) -> None:
        """Train to the end; at one of STOPS save a checkpoint of the last finished step and raise it."""
        self._boundary = self.state_dict()
        self._finished = self.step > 0 and self._p.is_last(self.step)
        try:
            if self.step == 0 and self._p.config.eval.every:
                scores = self._evaluate()
                self._record(scores | {"reward/mean": scores["eval/accuracy"]})
            while not self._finished:
                self._one()
        except STOPS:
            self._p.source.stop()
            if not self._p.interrupt.insisted:
                self._save("stopped")
            raise
        finally:
            self._p.source.stop()

    def _one(self) -> None:
        row, stop = self._train(self.step + 1)
        is_last = self._p.is_last(self.step)
        every = self._p.config.eval.every
        try:
            if stop is not None:
                raise stop
            if every and (is_last or self.step % every == 0):
                row |= self._evaluate()
        finally:  # the weights have moved, so the step is recorded whatever happens to its evaluation
            self._record(row)
        self._p.updater.check()
        self._finished = is_last or self._good_enough(row)
        if self._finished or (self._p.config.checkpoint.every and self.step % self._p.config.checkpoint.every == 0):
            self._save("saved")

    def _train(self, step: int) -> tuple[Row, BaseException | None]:
        """The step's row, and what kept the service from getting its weights."""
        start, failed, moved = time.monotonic(), self._p.collector.failed_rewards, self._p.collector.moved_requests
        drawn = self._collect()
        sampled = drawn.sampled
        collected = time.monotonic()
        totals = self._p.updater.step(sampled.groups, step, self._p.sync.version)
        metrics = totals.metrics(self._p.ranks)
        updated = time.monotonic()
        self.step = step
        synced, stop = self._publish()
        if stop is None:
            self._p.source.trained(self._p.sync.version)
        published = time.monotonic()
        row: Row = {
            **sampled.metrics(),
            **metrics,
            **synced,
            "lr": self._p.updater.learning_rate(step),
            "perf/rollout_tokens_per_s": sampled.counts.response_tokens / drawn.seconds,
            "perf/step_seconds": published - start,
            "perf/sampling_seconds": collected - start,
            "perf/training_seconds": updated - collected,
            "perf/publishing_seconds": published - updated,
            "reward/failed": self._p.collector.failed_rewards - failed,
            "sampling/requests_moved": self._p.collector.moved_requests - moved,
        }
        if self._p.ranks.is_main:
            self._p.recorder.samples(step, sampled)
        return row, stop

    def _collect(self) -> Drawn:
        """One step's groups, the same on every rank."""
        drawn = self._ask(lambda: self._p.source.take(self._p.sync.version, self._phase("sampling")))
        sampled = drawn.sampled
        if sampled.missing and self._p.ranks.is_main:
            self._p.recorder.note(
                f"step {self.step + 1}: {sampled.missing} of {self._p.config.sampling.prompts_per_step} groups "
                f"are missing after {sampled.counts.attempts} attempts; going on with the others"
            )
        return drawn

    def _ask(self, sample: Callable[[], T]) -> T:
        """What rank 0 gets from `sample`, on every rank; a service that has lost the policy is given it again."""
        for _ in range(MAX_REPAIRS):
            answer = self._p.ranks.on_main(lambda: self._try(sample, may_repair=True))
            if answer is not None:
                return answer[0]
            self._p.sync.repair(self._p.policy)
        answer = self._p.ranks.on_main(lambda: self._try(sample, may_repair=False))
        assert answer is not None
        return answer[0]

    def _try(self, sample: Callable[[], T], *, may_repair: bool) -> tuple[T] | None:
        try:
            with self._p.interrupt.anywhere():
                return (sample(),)
        except NeedsSnapshotError:
            if not may_repair:
                raise
        self._p.recorder.note("the service lost its weights; sending them again")
        return None

    def _publish(self) -> tuple[dict[str, float], BaseException | None]:
        """`sync/*` metrics, or what stopped it: the service has kept its weights then."""
        progress = self._phase("publishing") if self._p.ranks.is_main else None
        sent = 0

        def count(num_bytes: int) -> None:
            nonlocal sent
            sent += num_bytes
            if progress is not None:
                progress(sent, 0)

        self._published = False
        try:
            synced = self._p.sync.push(self._p.policy, count)
        except STOPS as stop:  # the weights have moved, so the step is recorded and saved before this is raised
            return {}, stop
        self._published = True
        return synced, None

    def _evaluate(self) -> Row:
        start = time.monotonic()
        scores = self._ask(self._scores)
        return scores.metrics() | {"perf/evaluating_seconds": time.monotonic() - start}

    def _scores(self) -> EvalScores:
        settings = self._p.config.eval
        return self._p.collector.evaluate(
            self._p.eval_prompts,
            n=settings.samples_per_problem,
            greedy=settings.greedy,
            max_tokens=settings.max_tokens or self._p.config.sampling.max_tokens,
            version=self._p.sync.version,
            on_progress=self._phase("evaluating"),
        )

    def _phase(self, name: str) -> Progress:
        """Shows that rank 0 gets on, to the person who watches and to the ranks that wait."""
        show = self._p.recorder.phase(name)

        def progress(done: int, total: int) -> None:
            self._p.ranks.beat()
            show(done, total)

        return progress

    def _record(self, row: Row) -> None:
        if self._p.ranks.is_main:
            self._p.recorder.write(row | {"step": self.step, "weight_version": self._p.sync.version})
        self._boundary = self.state_dict()

    def _good_enough(self, row: Row) -> bool:
        run, accuracy = self._p.config.run, row.get("eval/accuracy")
        wanted = run.stop_accuracy > 0 and self._p.sync.version >= run.stop_min_versions
        return wanted and accuracy is not None and accuracy >= run.stop_accuracy

    def _save(self, reason: str) -> None:
        if self._p.store.has(self._boundary["step"]):
            return
        folder = self._p.store.save(self._boundary["step"], self._p.policy, self._p.updater.optimizer, self._boundary)
        if self._p.ranks.is_main:
            self._p.recorder.note(f"{reason}: checkpoint {folder}")
