"""Clients of a load run: random requests, some of which are wrong and some of which nobody waits for.

Knows /generate and what must be true of its replies; knows nothing of updates, but for the versions there are.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

REPLY_LIMIT_S = 150.0  # beyond the limit of a request that the service is started with
_LEAVES, _IS_WRONG, _IS_EARLY = 0.12, 0.05, 0.02  # shares of requests
_BUSY = {429, 503}
_WRONG: list[dict[str, Any]] = [
    {"n": 0},
    {"n": 1 << 40},
    {"prompts": []},
    {"prompts": [[-1]]},
    {"prompts": [[1 << 40]]},
    {"top_logprobs": 99},
    {"sampling": {"max_tokens": 1 << 20}},
    {"sampling": {"temperature": 1e-9}},
    {"sampling": {"stop": [""]}},
    {"n": 2, "sampling": {"temperature": 0}},
    {"min_weight_version": -1},
    {"unknown": True},
]


@dataclass
class Versions:
    """Versions that may have drawn a token: those committed, and one whose commit is under way."""

    digests: dict[int, str] = field(default_factory=dict)
    latest: int = 0


@dataclass
class Tally:
    """What came of the requests; `problems` is what must not have happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    crossed: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Note what is wrong, the first hundred times."""
        self.outcomes["PROBLEM"] += 1
        if len(self.problems) < 100:
            self.problems.append(text[:500])
            print(f"PROBLEM {text[:500]}", flush=True)


Draws = Callable[[dict[str, Any], int, int, dict[str, Any]], str]
"""(request, prompt index, sample index, result) -> what is wrong with the tokens themselves, or an empty string."""


class Client:
    """One client that always has one request under way."""

    def __init__(
        self, http: httpx.AsyncClient, prompts: Sequence[str], versions: Versions, tally: Tally, seed: int
    ) -> None:
        self._http, self._prompts, self._versions, self._tally = http, prompts, versions, tally
        self._random = random.Random(seed)
        self.max_tokens = 96
        self.draws: Draws | None = None

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            chance = self._random.random()
            if chance < _LEAVES:
                await self._leave()
            elif chance < _LEAVES + _IS_WRONG:
                await self._wrong()
            elif chance < _LEAVES + _IS_WRONG + _IS_EARLY:
                await self._early()
            else:
                await self.ask(self.request())

    def request(self) -> dict[str, Any]:
        """A request of random shape."""
        draw = self._random
        prompts: list[Any] = []
        for text in draw.choices(self._prompts, k=draw.choice([1, 1, 1, 2, 4])):
            prompts.append(
                text if draw.random() < 0.7 else [draw.randrange(1, 400) for _ in range(draw.randrange(1, 60))]
            )
        sampling: dict[str, Any] = {"max_tokens": draw.randrange(1, self.max_tokens), "temperature": 1.0}
        if draw.random() < 0.5:
            sampling["seed"] = draw.randrange(1 << 31)
        if draw.random() < 0.2:
            sampling |= {"top_p": 0.9, "top_k": draw.choice([-1, 1, 50])}
        if draw.random() < 0.1:
            sampling["stop"] = draw.sample(["9", "the", "\n", "é"], 2)
        n = draw.choice([1, 1, 2, 4, 8])
        if n == 1 and draw.random() < 0.2:
            sampling["temperature"] = 0.0
        body = {"prompts": prompts, "n": n, "sampling": sampling}
        return body | {"min_weight_version": max(0, self._versions.latest - draw.choice([0, 0, 1, 5]))}

    async def ask(self, body: dict[str, Any]) -> None:
        """Send a right request and check its reply."""
        reply = await self._post(body)
        if reply is None:
            return
        self._tally.outcomes[str(reply.status_code)] += 1
        if reply.status_code == 200:
            self._check(body, reply.json())
        elif reply.status_code not in _BUSY:
            self._tally.problem(f"{reply.status_code} for {body}: {reply.text}")
        else:
            await asyncio.sleep(min(0.2, float(reply.headers["retry-after"])))

    async def _post(self, body: dict[str, Any]) -> httpx.Response | None:
        try:
            async with asyncio.timeout(REPLY_LIMIT_S):
                return await self._http.post("/generate", json=body)
        except TimeoutError:
            self._tally.problem(f"no reply in {REPLY_LIMIT_S:g} s for {body}")
        except httpx.HTTPError as error:
            self._tally.problem(f"{type(error).__name__} {error} for {body}")
        return None

    async def _leave(self) -> None:
        """Hang up at a random time."""
        self._tally.outcomes["left"] += 1
        try:
            async with asyncio.timeout(self._random.choice([0.0, 0.01, 0.1, 0.5, 1.0])):
                await self._http.post("/generate", json=self.request())
        except (TimeoutError, httpx.HTTPError):
            return

    async def _wrong(self) -> None:
        body = self.request() | self._random.choice(_WRONG)
        reply = await self._post(body)
        if reply is not None:
            self._tally.outcomes[f"wrong {reply.status_code}"] += 1
            if reply.status_code not in (413, 422, 503):
                self._tally.problem(f"{reply.status_code} for {body}: {reply.text}")

    async def _early(self) -> None:
        """Ask for weights that are far from being there."""
        reply = await self._post(self.request() | {"min_weight_version": self._versions.latest + 1000})
        if reply is not None:
            self._tally.outcomes[f"early {reply.status_code}"] += 1
            if reply.status_code not in (409, 429, 503):
                self._tally.problem(f"{reply.status_code} for a version to come: {reply.text}")

    def _check(self, body: dict[str, Any], reply: dict[str, Any]) -> None:
        if len(reply["results"]) != len(body["prompts"]):
            self._tally.problem(f"{len(reply['results'])} results for {len(body['prompts'])} prompts")
        for index, result in enumerate(reply["results"]):
            if len(result["completions"]) != body["n"]:
                self._tally.problem(f"{len(result['completions'])} completions, asked for {body['n']}")
            for number, completion in enumerate(result["completions"]):
                self._tally.tokens += len(completion["token_ids"])
                self._tally.crossed += len(completion["weight_versions"]) > 1
                complaint = self._complaint(body, reply["weight_version"], completion)
                if not complaint and self.draws is not None:
                    complaint = self.draws(body, index, number, result)
                if complaint:
                    self._tally.problem(f"{complaint}: {completion['weight_versions']} of {body}")

    def _complaint(self, body: dict[str, Any], began: int, completion: dict[str, Any]) -> str:
        """What is wrong with the version spans of a completion, or nothing."""
        spans, count = completion["weight_versions"], len(completion["token_ids"])
        versions = [version for version, _, _ in spans]
        ends = [0, *(end for _, _, end in spans)]
        starts = [*(start for _, start, _ in spans), count]
        if ends != starts or not 0 < count <= body["sampling"]["max_tokens"] or len(completion["logprobs"]) != count:
            return "spans do not cover the tokens"
        if versions != sorted(set(versions)):
            return "versions do not ascend"
        if not body["min_weight_version"] <= began <= versions[0]:
            return f"drawn before the version that was asked for, admitted at {began}"
        if unknown := [version for version in versions if version not in self._versions.digests]:
            return f"version {unknown[0]} never was"
        if any(logprob > 0 for logprob in completion["logprobs"]):
            return "a probability above one"
        return ""
