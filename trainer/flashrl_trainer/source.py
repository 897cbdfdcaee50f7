"""Where a step's samples come from when sampling and training take turns: from the weights that it trains on.

Lives on rank 0. Knows the collector, dynamic sampling and the prompts' position; knows nothing of training.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

from flashrl_trainer.collect import Collector, Progress
from flashrl_trainer.samples import Prompt
from flashrl_trainer.sampling import DynamicSampling, SampledStep


class Prompts(Protocol):
    """An endless, resumable stream of training prompts."""

    def next(self, n: int) -> list[Prompt]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Drawn:
    """A step's groups, and how long it took to sample them."""

    sampled: SampledStep
    seconds: float


class Source(Protocol):
    """Samples of one step after the other."""

    def take(self, version: int, progress: Progress) -> Drawn:
        """The groups of a step that trains on `version`; after an error it may be called again."""

    def trained(self, version: int) -> None:
        """The step taken last was trained, and `version` is what came of it."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to draw the same prompts and seeds for the step after the one taken last."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def stop(self) -> None:
        """Draw nothing more; harmless when repeated."""


class Draws(Protocol):
    """One step's sampling in two parts, so that the second can be repeated."""

    def begin(self, version: int) -> None: ...
    def fill(self, version: int, progress: Progress) -> SampledStep: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Sampler:
    """Draws through the collector."""

    def __init__(self, collector: Collector, sampling: DynamicSampling, prompts: Prompts) -> None:
        self._collector, self._sampling, self._prompts = collector, sampling, prompts

    def begin(self, version: int) -> None:
        """A step that will train on `version`."""
        self._sampling.begin_step(version)

    def fill(self, version: int, progress: Progress) -> SampledStep:
        """Its groups, from weights of `version` or later; after an error it may be called again."""
        return self._collector.fill(self._sampling, self._prompts.next, version, progress)

    def state_dict(self) -> dict[str, Any]:
        """Of everything that a step draws from."""
        return {
            "drawn": self._collector.drawn,
            "prompts": self._prompts.state_dict(),
            "sampling": self._sampling.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was."""
        self._collector.drawn = state["drawn"]
        self._prompts.load_state_dict(state["prompts"])
        self._sampling.load_state_dict(state["sampling"])


class InTurn:
    """Samples when it is asked to."""

    def __init__(self, sampler: Draws) -> None:
        self._sampler = sampler
        self._is_begun = False

    def take(self, version: int, progress: Progress) -> Drawn:
        """The groups of a step that trains on `version`, drawn now."""
        start = time.monotonic()
        if not self._is_begun:
            self._sampler.begin(version)
        self._is_begun = True
        sampled = self._sampler.fill(version, progress)
        self._is_begun = False
        return Drawn(sampled, time.monotonic() - start)

    def trained(self, version: int) -> None:
        """Nothing waits for it."""

    def state_dict(self) -> dict[str, Any]:
        """As it is now."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sampler.load_state_dict(state)

    def stop(self) -> None:
        """Nothing is under way."""
