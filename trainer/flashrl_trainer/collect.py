"""Prompts -> samples -> rewards: fills a step with groups, and evaluates through the same service.

Knows the balancer, the rewards and the seeds; which groups are kept is `sampling`'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashrl_trainer.algorithm.shaping import soft_overlong_penalty
from flashrl_trainer.balancer import Balancer
from flashrl_trainer.eval_scores import EvalScores
from flashrl_trainer.samples import Completion, Group, Prompt, Sample
from flashrl_trainer.sampling import DynamicSampling, SampledStep
from flashrl_trainer.scoring import Answer, Scorer
from flashrl_wire import messages

PROMPTS_PER_REQUEST = 8
_MAX_SEED = 1 << 62

Progress = Callable[[int, int], None]  # (done, total) prompts of the round


@dataclass(frozen=True)
class Overlong:
    """The soft punishment of `algorithm.shaping`, in tokens of the response."""

    buffer: int
    factor: float


class Collector:
    """Draws samples for prompts; `drawn` counts them, so that every sample of a run has a seed of its own."""

    def __init__(
        self, balancer: Balancer | None, scorer: Scorer, sampling: messages.Sampling, n: int, overlong: Overlong | None
    ) -> None:
        self._balancer, self._scorer, self._sampling, self._n, self._overlong = balancer, scorer, sampling, n, overlong
        self.drawn = 0
        self._unanswered: list[Prompt] = []

    @property
    def failed_rewards(self) -> int:
        """So far; the groups they are in were left out."""
        return self._scorer.failed

    @property
    def moved_requests(self) -> int:
        """So far; they were lost with a replica and asked again."""
        return self._balancer.moved if self._balancer is not None else 0

    def fill(
        self,
        sampling: DynamicSampling,
        next_prompts: Callable[[int], list[Prompt]],
        weight_version: int,
        on_progress: Progress,
    ) -> SampledStep:
        """The rest of a step that `sampling` has begun; NoMixedGroupsError if there is nothing to learn from.

        After an error it may be called again: the prompts of the failed round are asked first.
        """
        while wanted := sampling.prompts_wanted():
            self._unanswered = self._unanswered or next_prompts(wanted)
            if not self._unanswered:
                break
            sampling.add(self.sample(self._unanswered, weight_version, on_progress))
            self._unanswered = []
        return sampling.finish_step()

    def sample(self, prompts: Sequence[Prompt], weight_version: int, on_progress: Progress) -> list[Group]:
        """One group a prompt, drawn from weights of at least `weight_version`, but for groups with a failed reward."""
        settings = self._sampling.model_copy(update={"seed": self._seed()})
        replies = self._ask(prompts, settings, self._n, weight_version, on_progress)
        self.drawn += len(prompts) * self._n
        scored = zip(prompts, replies, self._score(prompts, replies), strict=True)
        return [
            self._group(prompt, result, version, [reward for reward in rewards if reward is not None])
            for prompt, (result, version), rewards in scored
            if None not in rewards  # without one, what the others' rewards are worth is not known
        ]

    def evaluate(
        self, prompts: Sequence[Prompt], *, n: int, greedy: bool, max_tokens: int, version: int, on_progress: Progress
    ) -> EvalScores:
        """Rewards of n samples a prompt at temperature 1 (the same seeds every time), and of one greedy answer.

        A reward that fails counts as 0.
        """
        settings = messages.Sampling(temperature=1.0, max_tokens=max_tokens, seed=0)
        sampled = self._ask(prompts, settings, n, version, on_progress)
        best = None
        if greedy:
            settings = messages.Sampling(temperature=0.0, max_tokens=max_tokens)
            best = self._score(prompts, self._ask(prompts, settings, 1, version, on_progress))
        return EvalScores(
            [[reward or 0.0 for reward in rewards] for rewards in self._score(prompts, sampled)],
            None if best is None else [reward or 0.0 for (reward,) in best],
        )

    def _seed(self) -> int:
        return ((self._sampling.seed or 0) * 0x9E3779B1 + self.drawn) % _MAX_SEED

    def _ask(
        self, prompts: Sequence[Prompt], settings: messages.Sampling, n: int, version: int, on_progress: Progress
    ) -> list[tuple[messages.GenerateResult, int]]:
        requests = []
        for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
            seed = None if settings.seed is None else settings.seed + start * n
            requests.append(
                messages.GenerateRequest(
                    prompts=[prompt.prompt for prompt in prompts[start : start + PROMPTS_PER_REQUEST]],
                    n=n,
                    sampling=settings.model_copy(update={"seed": seed}),
                    min_weight_version=version,
                )
            )
        done = 0

        def count(reply: messages.GenerateResponse) -> None:
            nonlocal done
            done += len(reply.results)
            on_progress(done, len(prompts))

        assert self._balancer is not None, "only rank 0 samples"
        replies = self._balancer.generate(requests, count)
        return [(result, reply.weight_version) for reply in replies for result in reply.results]

    def _group(self, prompt: Prompt, result: messages.GenerateResult, version: int, rewards: list[float]) -> Group:
        samples = [self._shaped(*scored) for scored in zip(result.completions, rewards, strict=True)]
        return Group(prompt, result.prompt_token_ids, samples, version)

    def _shaped(self, completion: messages.Completion, reward: float) -> Sample:
        penalty = 0.0
        if self._overlong is not None:
            length = torch.tensor([len(completion.token_ids)])
            limit, buffer, factor = self._sampling.max_tokens, self._overlong.buffer, self._overlong.factor
            penalty = float(soft_overlong_penalty(length, limit, buffer, factor))
        return Sample(_completion(completion), reward, reward + penalty)

    def _score(
        self, prompts: Sequence[Prompt], replies: Sequence[tuple[messages.GenerateResult, int]]
    ) -> list[list[float | None]]:
        """Rewards of each prompt's completions, None where one failed."""
        answers = [
            Answer(prompt.id, completion.text, prompt.answer)
            for prompt, (result, _) in zip(prompts, replies, strict=True)
            for completion in result.completions
        ]
        rewards = iter(self._scorer.score(answers))
        return [[next(rewards) for _ in result.completions] for result, _ in replies]


def _completion(message: messages.Completion) -> Completion:
    return Completion(message.token_ids, message.logprobs, message.text, message.finish_reason, message.weight_versions)
