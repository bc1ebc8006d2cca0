"""From prompts to judged completions of the policy as it is.

B completions, those of a prompt (its group) next to each other; K reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .config import TrainConfig
from .data import encode_prompt
from .distributed import World
from .metrics import timed
from .model import Policy
from .prompt_order import hashed_seed
from .rewards import Completion, Judges, decode_completions
from .rewards.seeding import seed_generators
from .rollout import Drawn, Rollout, SamplingParams
from .rollout_fn import Engine, RolloutFunction, play


@dataclass(frozen=True)
class Sample:
    """A completion and what is known of it before training."""

    prompt: Any
    text: Completion
    drawn: Drawn
    rewards_K: Tensor  # NaN where a function did not judge; of step rewards the sum
    steps_K: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """By reward function that judged steps: where each ends, and its reward."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the rollout and the reward functions want to be seen beside it."""

    @property
    def num_counted(self) -> int:
        """Tokens that the policy has written."""
        counted = self.drawn.counted
        return len(self.drawn.completion_ids) if counted is None else sum(counted)

    def line(self, reward_names: Sequence[str]) -> dict[str, Any]:
        """Return what is logged of it; what is no number is None.

        `num_tokens` are those that the policy has written, as lengths in metrics.jsonl;
        `num_tool_tokens`, if there is a mask of them, the others of the completion.
        """
        rewards = [None if math.isnan(reward) else reward for reward in self.rewards_K.tolist()]
        line = {
            "prompt": self.prompt,
            "completion": self.text,
            "rewards": dict(zip(reward_names, rewards, strict=True)),
            "num_tokens": self.num_counted,
            "finished": self.drawn.finished,
        }
        if self.drawn.counted is not None:
            line["num_tool_tokens"] = len(self.drawn.completion_ids) - self.num_counted
        return line | ({"extra": self.extra} if self.extra else {})

    def steps_of(self, k: int) -> list[tuple[int, float]]:
        """Return the steps that reward function k judged; an outcome is one, at the last token."""
        if k in self.steps_K or self.rewards_K[k].isnan():
            return self.steps_K.get(k, [])
        return [(len(self.drawn.completion_ids) - 1, float(self.rewards_K[k]))]


@dataclass
class TrainerState:
    """What reward functions get as `trainer_state`."""

    global_step: int = 0
    """Optimisation steps taken."""
    max_steps: int = 0
    """Of the run."""


class Sampler:
    """Samples completions with an engine, or with the user's `rollout_fn`, and has them judged."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        rollout: Rollout,
        judges: Judges,
        rollout_fn: RolloutFunction | None = None,
        world: World | None = None,
    ) -> None:
        self.config, self.policy, self.rollout, self.judges = config, policy, rollout, judges
        self.world = world or World()
        self.rollout_fn = rollout_fn
        self.state = TrainerState()
        self._problems: list[str] = []
        self._logged: list[list[tuple[dict[str, float], int]]] = []
        self.sampling = SamplingParams(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
        )

    def sample(
        self,
        rows: Mapping[str, Sequence[Any]],
        num_generations: int,
        seeds: Sequence[int],
        *,
        times: dict[str, float],
        sampling: SamplingParams | None = None,
        evaluation: bool = False,
    ) -> list[Sample]:
        """Sample and judge completions of each prompt: every rank of some, for all to have.

        Args:
            rows: columns of the dataset, `prompt` among them.
            num_generations: completions of each prompt.
            seeds: of the random numbers of each prompt, `prompt_seeds` for example.
            times: seconds are added to its `generate` and `reward`.
            sampling: None for that of the run.
            evaluation: failures of reward functions are counted apart from those in training.
        """
        own = self.world.share(len(seeds))
        part = {name: list(values)[own.start : own.stop] for name, values in rows.items()}
        mine = self._sample(
            part,
            num_generations,
            [seeds[i] for i in own],
            times=times,
            sampling=sampling or self.sampling,
            evaluation=evaluation,
        )
        parts = [mine]
        if self.world.size > 1:
            with timed(times, "gather"):  # and wait for the slowest
                parts = self.world.gather(mine)
        for _, _, problems in parts:
            self._problems += problems
        self._logged.append([(metrics, len(samples)) for samples, metrics, _ in parts])
        return [sample for samples, _, _ in parts for sample in samples]

    def _sample(
        self,
        rows: Mapping[str, list[Any]],
        num_generations: int,
        seeds: list[int],
        *,
        times: dict[str, float],
        sampling: SamplingParams,
        evaluation: bool,
    ) -> tuple[list[Sample], dict[str, float], list[str]]:
        """Do a rank's part of `sample`; return what reward functions log and complain of as well.

        It may have no prompt; its failures so far count all the same.
        """
        columns = {
            name: [value for value in values for _ in range(num_generations)]
            for name, values in rows.items()
        }
        prompts = columns.pop("prompt")
        with timed(times, "generate"), self.policy.whole():
            if not prompts:
                return [], {**self.judges.failures.counts[evaluation]}, []
            drawn, extra = self._draw(prompts, columns, num_generations, sampling, seeds)
        with timed(times, "reward"):
            completion_ids = [one.completion_ids for one in drawn]
            texts = decode_completions(prompts, completion_ids, self.policy.tokenizer)
            scores = self.judges.score(
                prompts=prompts,
                completions=texts,
                completion_ids=completion_ids,
                columns=columns | extra,
                trainer_state=self.state,
                evaluation=evaluation,
            )
        extra |= scores.extra
        samples = [
            Sample(
                prompt=prompts[i],
                text=texts[i],
                # What is sent brings all along that it is a view of.
                drawn=one if self.world.size == 1 else replace(one, logps=one.logps.cpu().clone()),
                rewards_K=scores.rewards_BK[i].clone(),
                steps_K={k: steps[i] for k, steps in scores.steps.items()},
                extra={name: values[i] for name, values in extra.items()},
            )
            for i, one in enumerate(drawn)
        ]
        return samples, scores.metrics, self.rollout.take_problems() + scores.problems

    def take_problems(self) -> list[str]:
        """Return what went wrong in reward functions since the last time, a sentence each."""
        problems, self._problems = self._problems, []
        return problems

    def take_logged(self) -> dict[str, float]:
        """Return what reward functions have logged since the last time, a mean over completions.

        Their counts of failures are the last there were, of all ranks together.
        """
        logged, self._logged = self._logged, []
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for parts in logged:
            for name in {name for metrics, _ in parts for name in metrics}:
                found = [(own[name], count) for own, count in parts if name in own]
                if name.startswith("rewards/"):
                    sums[name], weights[name] = sum(value for value, _ in found), 1
                else:
                    sums[name] = sums.get(name, 0.0) + sum(value * count for value, count in found)
                    weights[name] = weights.get(name, 0) + sum(count for _, count in found)
        return {name: total / weights[name] for name, total in sums.items()}

    def _draw(
        self,
        prompts: list[Any],  # B
        columns: dict[str, list[Any]],
        num_generations: int,
        sampling: SamplingParams,
        seeds: Sequence[int],  # one for the copies of a prompt
    ) -> tuple[list[Drawn], dict[str, list[Any]]]:
        """Return a completion for each prompt, and the columns a `rollout_fn` has added."""
        if self.rollout_fn is not None:
            seed_generators(hashed_seed("rollout_fn", *seeds))  # for what it draws itself
            engine = Engine(self.rollout, self.policy, sampling, seeds, encode=self.encode)
            return play(self.rollout_fn, prompts, columns, engine)
        prompt_ids = [self.encode(prompt) for prompt in prompts[::num_generations]]
        with self.policy.sampling():
            completions = self.rollout.generate(prompt_ids, num_generations, sampling, seeds)
        return completions.drawn(prompt_ids, num_generations), {}

    def encode(self, prompt: Any) -> list[int]:
        """Return the token ids of a prompt, with what the configuration puts around it."""
        return encode_prompt(
            prompt,
            self.policy.tokenizer,
            system_prompt=self.config.system_prompt,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )
