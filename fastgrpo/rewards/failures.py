"""What reward functions have failed of in a run: counts for the metrics, and what has been told."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from .contract import RewardError
from .functions import Failure


class Failures:
    """Stops a run at a failure, or counts it and tells of what is new."""

    def __init__(self, errors: Literal["stop", "none"]) -> None:
        self.errors = errors
        self.counts: dict[bool, dict[str, int]] = {False: {}, True: {}}
        """How many there were so far, by metric, of training and (True) of evaluations."""
        self._told: set[tuple[bool, str, str, str]] = set()

    def note(self, name: str, failure: Failure, count: int, *, evaluation: bool) -> str | None:
        """Take note of one, and return a sentence for what is new.

        Args:
            name: of the reward function.
            failure: it.
            count: completions that were to be judged.
            evaluation: those of training are counted, and told, apart from these.

        Raises:
            RewardError: the run is to stop at the first.
        """
        kind = failure["kind"]
        said = f"reward function {name!r} {failure['what']}"
        if kind != "invalid":  # which says what it is of, and what to do
            said += f" over {count} completions{failure['where']}"
        if self.errors == "stop":
            remedies = {"exceptions": "mend it, ", "timeouts": "raise reward_timeout, "}
            said += f"; {remedies.get(kind, '')}or set reward_errors: none to do without"
            error = RewardError(said)
            if failure["traceback"]:
                error.add_note(failure["traceback"])
            raise error
        metric = f"rewards/{name}/{kind}"
        counts = self.counts[evaluation]
        counts[metric] = counts.get(metric, 0) + 1
        what = "" if kind == "invalid" else failure["what"]  # tells of one completion
        new = evaluation, name, kind, failure["where"] or what
        if new in self._told:
            return None
        self._told.add(new)
        return f"{said}; none of them has a reward of it (reward_errors: none)"

    @contextmanager
    def undone_if_left(self) -> Generator[None]:
        """Forget what comes within the block if it is left early: it will come again."""
        counts, told = {key: {**own} for key, own in self.counts.items()}, {*self._told}
        try:
            yield
        except BaseException:
            self.counts, self._told = counts, told
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted and told so far, plain values."""
        counts = {"training": self.counts[False], "evaluations": self.counts[True]}
        return {"counts": counts, "told": sorted(self._told)}

    def load_state_dict(self, states: Iterable[Mapping[str, Any]], *, is_main: bool) -> None:
        """Take back what the processes of a run have returned of `state_dict`.

        Args:
            states: of all of them.
            is_main: this process goes on with the counts of all; the others begin at 0.
        """
        for state in states:
            self._told |= {(evaluation, *words) for evaluation, *words in state["told"]}
            for evaluation, key in ((False, "training"), (True, "evaluations")):
                for metric, count in state["counts"][key].items() if is_main else ():
                    counts = self.counts[evaluation]
                    counts[metric] = counts.get(metric, 0) + count
