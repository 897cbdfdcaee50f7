"""Prompts -> samples -> rewards: fills a step with groups, and evaluates through the same service.

Knows the balancer, the rewards and the seeds; which groups are kept is `sampling`'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flashrl_trainer.algorithm.shaping import soft_overlong_penalty
from flashrl_trainer.balancer import Balancer
from flashrl_trainer.rewards import Reward
from flashrl_trainer.samples import Completion, Group, Prompt, Sample
from flashrl_trainer.sampling import DynamicSampling, SampledStep
from flashrl_wire import messages

PROMPTS_PER_REQUEST = 8
_MAX_SEED = 1 << 62

Progress = Callable[[int, int], None]  # (done, total) prompts of the round


@dataclass(frozen=True)
class Overlong:
    """The soft punishment of `algorithm.shaping`, in tokens of the response."""

    buffer: int
    factor: float


@dataclass(frozen=True)
class EvalScores:
    """Mean rewards on the evaluation set: sampled at temperature 1, and greedy (None: not asked for)."""

    accuracy: float
    greedy: float | None
    num_samples: int


class Collector:
    """Draws samples for prompts; `drawn` counts them, so that every sample of a run has a seed of its own."""

    def __init__(
        self, balancer: Balancer | None, reward: Reward, sampling: messages.Sampling, n: int, overlong: Overlong | None
    ) -> None:
        self._balancer, self._reward, self._sampling, self._n, self._overlong = balancer, reward, sampling, n, overlong
        self.drawn = 0
        self._unanswered: list[Prompt] = []

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
        """One group a prompt, drawn from weights of at least `weight_version`."""
        settings = self._sampling.model_copy(update={"seed": self._seed()})
        replies = self._ask(prompts, settings, self._n, weight_version, on_progress)
        self.drawn += len(prompts) * self._n
        return [
            self._group(prompt, result, version) for prompt, (result, version) in zip(prompts, replies, strict=True)
        ]

    def evaluate(
        self, prompts: Sequence[Prompt], *, n: int, greedy: bool, max_tokens: int, version: int, on_progress: Progress
    ) -> EvalScores:
        """Mean reward of n samples a prompt at temperature 1 (the same seeds every time), and of one greedy answer."""
        settings = messages.Sampling(temperature=1.0, max_tokens=max_tokens, seed=0)
        sampled = self._ask(prompts, settings, n, version, on_progress)
        best = None
        if greedy:
            settings = messages.Sampling(temperature=0.0, max_tokens=max_tokens)
            best = self._mean(prompts, self._ask(prompts, settings, 1, version, on_progress))
        return EvalScores(self._mean(prompts, sampled), best, len(prompts) * n)

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

    def _group(self, prompt: Prompt, result: messages.GenerateResult, version: int) -> Group:
        samples = [self._scored(prompt, completion) for completion in result.completions]
        return Group(prompt, result.prompt_token_ids, samples, version)

    def _scored(self, prompt: Prompt, completion: messages.Completion) -> Sample:
        reward = self._reward(completion.text, prompt.answer)
        penalty = 0.0
        if self._overlong is not None:
            length = torch.tensor([len(completion.token_ids)])
            limit, buffer, factor = self._sampling.max_tokens, self._overlong.buffer, self._overlong.factor
            penalty = float(soft_overlong_penalty(length, limit, buffer, factor))
        return Sample(_completion(completion), reward, reward + penalty)

    def _mean(self, prompts: Sequence[Prompt], replies: Sequence[tuple[messages.GenerateResult, int]]) -> float:
        rewards = [
            self._reward(completion.text, prompt.answer)
            for prompt, (result, _) in zip(prompts, replies, strict=True)
            for completion in result.completions
        ]
        return sum(rewards) / len(rewards)


def _completion(message: messages.Completion) -> Completion:
    return Completion(message.token_ids, message.logprobs, message.text, message.finish_reason, message.weight_versions)
