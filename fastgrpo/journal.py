"""Where the story of a run goes: its directory, the terminal, trackers, and warnings in words."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from .config import TrainConfig
from .console import Console
from .experience import Experience
from .health import Health
from .json_lines import read_lines
from .run_directory import RunDirectory
from .signals import Stopped
from .trackers import Tracker, build_trackers


class Journal:
    """Everything that is written of a run; used in a `with` block around that of its console."""

    def __init__(
        self, config: TrainConfig, run: RunDirectory, console: Console, reward_names: Sequence[str]
    ) -> None:
        self.config, self.run, self.console = config, run, console
        self.reward_names = list(reward_names)
        self.health = Health(config)
        self.trackers: list[Tracker] = []
        if run.left_by is not None:
            console.message(f"taken over from {run.left_by}, which has died")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close_trackers(failed=not (error is None or isinstance(error, Stopped)))
        if error is not None and self.run.is_bare:
            self.run.discard()  # else it would be in the way of the next start
        self.run.close()

    def begin(self) -> None:
        """Start the trackers, once the run has been found to fit.

        Raises:
            ValueError: see `build_trackers`.
        """
        self.trackers = build_trackers(self.config, self.run.path, self.console.warning)

    def close_trackers(self, *, failed: bool) -> None:
        """Close those that have been started, see `Tracker.close`."""
        for tracker in self.trackers:
            tracker.close(failed=failed)

    def go_on(self, step: int, sizes: Mapping[str, int] | None) -> None:
        """Begin, take back what was written after a step, and let it be known what was before.

        Args:
            step: see `RunDirectory.cut`.
            sizes: too.

        Raises:
            ValueError: see `build_trackers` and `RunDirectory.cut`; nothing has been taken back.
        """
        self.begin()
        self.run.cut(step, sizes)
        path = self.run.path / "metrics.jsonl"
        for metrics in read_lines(path) if path.exists() else ():
            # It is said again of none of them.
            deque(self.health.warnings(metrics, fresh="time/generate" in metrics), maxlen=0)

    def generation(self, step: int, found: Experience, *, logged: bool) -> None:
        """Write what was sampled.

        Args:
            step: the first optimisation step that it serves.
            found: completions, rewards, advantages.
            logged: one of the steps that it serves is logged.
        """
        self.run.add_rewards(step, found, self.reward_names)
        sample, advantage = found.samples[0], found.advantages[0]
        self.console.sample(
            prompt=sample.prompt,
            completion=sample.text,
            rewards=dict(zip(self.reward_names, sample.rewards_K.tolist(), strict=True)),
            advantage=advantage.mean().nan_to_num().item(),
        )
        if logged:
            count = self.config.num_completions_to_log
            lines = self.run.add_completions(step, found, self.reward_names, count)
            for tracker in self.trackers:
                tracker.completions(lines, step)

    def step(self, metrics: Mapping[str, Any], *, fresh: bool) -> None:
        """Write the metrics of an optimisation step.

        Args:
            metrics: by name, `step` among them.
            fresh: the policy has not moved since its completions were sampled.
        """
        step = int(metrics["step"])
        self.run.add_metrics(dict(metrics))
        self.console.step(metrics)
        for tracker in self.trackers:
            tracker.log(metrics, step)
        self.warn(step, *self.health.warnings(metrics, fresh=fresh))

    def warn(self, step: int, *texts: str) -> None:
        """Say what is wrong, and keep it."""
        for text in texts:
            self.run.add_warning(step, text)
            self.console.warning(text)

    def finish(
        self, before: Mapping[str, float], after: Mapping[str, float], **facts: Any
    ) -> dict[str, Any]:
        """Write the summary, show what was reached, and return what the summary holds.

        Args:
            before: the first reward function's mean on the test split, by way of decoding.
            after: the same after training.
            facts: what else is known.
        """
        judge = self.reward_names[0]
        summary: dict[str, Any] = {**facts, "judge": judge}
        if before:
            summary["test"] = {how: {"before": before[how], "after": after[how]} for how in before}
            title = f"{judge} on held-out prompts"
            self.console.accuracies(title, summary["test"], share=not self.run.graded)
        summary = self.run.finish(f"rewards/{judge}/mean", **summary)
        self.console.message(f"run directory: {self.run.path}")
        return summary


class MuteJournal(Journal):
    """The journal of a process that is not the first: what it would write the first one writes."""

    def __init__(
        self, config: TrainConfig, run: RunDirectory, console: Console, reward_names: Sequence[str]
    ) -> None:
        self.config, self.run, self.console = config, run, console
        self.reward_names = list(reward_names)
        self.trackers = []

    def __exit__(self, *error: object) -> None:
        pass

    def generation(self, step: int, found: Experience, *, logged: bool) -> None:
        """Write nothing."""

    def step(self, metrics: Mapping[str, Any], *, fresh: bool) -> None:
        """Write nothing."""

    def warn(self, step: int, *texts: str) -> None:
        """Write nothing."""
