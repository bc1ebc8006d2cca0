"""What a run leaves behind on its way: checkpoints, the best of them, and what adapters are on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import (
    begin_checkpoint,
    discard_checkpoint,
    finish_checkpoint,
    name_base,
    nameless_base,
    put_aside,
)
from .config import ConfigError, TrainConfig
from .durable import WriteError, writing
from .manifest import damage
from .metrics import completion_metrics, reward_metrics
from .rewards import Judges
from .rewards.contract import is_reserved
from .run_checkpoints import BEST
from .signals import Stopped
from .training_state import save_state

if TYPE_CHECKING:
    from .trainer import Trainer


class Saver:
    """Writes the checkpoints of a run; all ranks call it."""

    def __init__(self, trainer: Trainer) -> None:
        """Take whose checkpoints.

        Raises:
            ConfigError: no evaluation of the run can have its metric_for_best_model.
        """
        self.trainer = trainer
        self.metric = best_metric(trainer.config, trainer.judges)
        self.best: dict[str, Any] | None = None
        """Metric, value and step of what is in the directory `best`."""
        self.saved_step = -1
        """That of the newest checkpoint; -1: there is none."""
        self._failed = 0

    def save_base(self) -> None:
        """Save what adapters were put on, if there is no name to load it by."""
        trainer, policy = self.trainer, self.trainer.policy
        base = nameless_base(policy.model)
        if base is not None:
            path, parameters = trainer.run.base, policy.state_dict(base)
            trainer.world.on_main(
                lambda: name_base(path, policy.model, policy.tokenizer, parameters)
            )

    def after_evaluation(self, evaluation: Mapping[str, float]) -> None:
        """Keep the model if it is the best so far.

        Args:
            evaluation: its metrics; none, if it has not been evaluated.

        Raises:
            ConfigError: metric_for_best_model is none of them.
        """
        if self.metric is None or not evaluation:
            return
        if self.metric not in evaluation:
            raise _no_such_metric(self.metric, evaluation)
        value = evaluation[self.metric]
        best = {"metric": self.metric, "value": value, "step": self.trainer.step}
        if self._is_best(value) and self._try(lambda: self.save(self._best_path, best=best)):
            self.best = best

    def try_step(self) -> None:
        """Write the checkpoint of a step; if it fails, do what `save_errors` says.

        While steps are skipped there is none: the model may be broken for good.
        """
        if not self._is_skipping:
            self._try(self.save_step)

    def save_step(self) -> None:
        """Write the checkpoint of the step that has been taken, and delete those that are too old.

        Raises:
            WriteError: see `save`; no other checkpoint has been touched.
        """
        trainer, checkpoints = self.trainer, self.trainer.run.checkpoints
        self.save(checkpoints.of_step(trainer.step), state=self.saves_state)
        self.saved_step = trainer.step
        limit = None if self._is_skipping else trainer.config.save_total_limit
        told = trainer.world.on_main(lambda: checkpoints.remove_old(limit))
        trainer.journal.warn(trainer.step, *told)

    @property
    def _is_skipping(self) -> bool:
        """Whether the last step was not taken, and what is older may be the last that is good."""
        return self.trainer.learner.bad_steps.in_a_row > 0

    @property
    def saves_state(self) -> bool:
        """Whether checkpoints hold what the run needs to go on from them."""
        return not self.trainer.config.save_only_model

    def leave(self, number: int) -> Stopped:
        """Save a run where it is, whatever `save_strategy` says; return what says so.

        Args:
            number: the signal that it stops for.
        """
        step, path = self.trainer.step, self.trainer.run.path
        if self.saved_step != step:
            self.save_step()
        text = f"stopped by {Signals(number).name} after step {step}"
        text += f", saved in {path}/checkpoints/step-{step}"
        if self.saves_state:
            text += f"; {self.trainer.run.checkpoints.how_to_go_on}"
        else:
            text += ", the model alone: there is no going on from it"
        return Stopped(number, text)

    def save(
        self, path: Path, *, state: bool = False, best: Mapping[str, Any] | None = None
    ) -> None:
        """Write a Hugging Face checkpoint.

        Args:
            path: its directory.
            state: with what the run needs to go on from it.
            best: what is told in it, if it is the best.

        Raises:
            WriteError: the disk is full, for example; nothing is left of the checkpoint.
        """
        trainer, policy, world = self.trainer, self.trainer.policy, self.trainer.world
        try:
            with writing(path):  # what save_state raises
                aside = world.on_main(lambda: begin_checkpoint(path))
                if state:
                    save_state(aside / "state", trainer)
            parameters = policy.state_dict(policy.model)

            def finish() -> None:
                trainer.run.sync()
                with writing(path):
                    if best is not None:
                        (aside / BEST).write_text(json.dumps(best, indent=2) + "\n")
                finish_checkpoint(path, policy.model, policy.tokenizer, state_dict=parameters)

            world.on_main(finish)
        except BaseException:
            if world.is_main:
                discard_checkpoint(path)
            raise

    def metrics(self) -> dict[str, float]:
        """Return how many checkpoints have failed since the last time, if that is counted."""
        failed, self._failed = self._failed, 0
        return {"checkpoints/failed": failed} if self.trainer.config.save_errors == "none" else {}

    def summary(self) -> dict[str, Any]:
        """Return what the summary tells of the best model, if one is kept."""
        return {} if self.metric is None else {"best": self.best}

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` has returned."""
        self.best = state["best"]
        if self.trainer.taken is None:  # else it is saved again once it is finished
            self.saved_step = self.trainer.step

    def check_best(self) -> None:
        """Take what is in `best`, which may be of a later step; if it is damaged, say so."""
        if self.metric is not None:
            self.best, problems = self.trainer.world.on_main(self._read_best)
            self.trainer.journal.warn(self.trainer.step, *problems)

    def _read_best(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return what is told in `best`, and what is wrong with it; then it gets another name."""
        path, name = self._best_path, ""
        if path.is_dir():
            problem = damage(path)
            if problem is None:
                return json.loads((path / BEST).read_text(encoding="utf-8")), []
            name = f" and now called {put_aside(path).name}"
        elif self.best is None:
            return None, []
        else:
            problem = "it is missing"
        follows = "the next evaluation begins another"
        return None, [f"checkpoint best is damaged{name}: {problem}; {follows}"]

    @property
    def _best_path(self) -> Path:
        return self.trainer.run.path / "best"

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        more = value > self.best["value"]
        return more if self._greater_is_better else value < self.best["value"]

    @property
    def _greater_is_better(self) -> bool:
        given = self.trainer.config.greater_is_better
        return not str(self.metric).endswith("loss") if given is None else given

    def _try(self, save: Callable[[], None]) -> bool:
        """Save something, and say whether that was possible.

        Raises:
            WriteError: it was not, and the run is to stop then.
        """
        try:
            save()
        except WriteError as error:
            if self.trainer.config.save_errors == "stop":
                raise
            self._failed += 1
            text = f"{error}; the run goes on, since save_errors is none"
            self.trainer.journal.warn(self.trainer.step, text)
            return False
        return True


def best_metric(config: TrainConfig, judges: Judges) -> str | None:
    """Return the name that metric_for_best_model has in metrics.jsonl; None: there is none.

    Raises:
        ConfigError: no evaluation of the run can have it.
    """
    if config.metric_for_best_model is None:
        return None
    name = config.metric_for_best_model.removeprefix("eval_")
    count = config.num_generations_eval or config.num_generations
    nothing = torch.zeros(1, len(judges.names))
    known = reward_metrics(judges.names, judges.weights, nothing) | completion_metrics([1], [True])
    known |= {f"pass@{count}": 0.0} if count > 1 else {}
    # Others are what reward functions log, and not known before they have.
    if name not in known and (is_reserved(name) or name.startswith("pass@")):
        raise _no_such_metric(name, known)
    return f"eval_{name}"


def _no_such_metric(name: str, known: Mapping[str, float]) -> ConfigError:
    names = sorted(each.removeprefix("eval_") for each in known)
    return ConfigError(
        f"metric_for_best_model: evaluations of this run have no {name.removeprefix('eval_')}; "
        f"write one of {', '.join(names)}"
    )
