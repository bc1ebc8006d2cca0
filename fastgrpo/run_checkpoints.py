"""The checkpoints of a run: which is gone on from, and which are deleted or put aside."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import put_aside, remove_checkpoint, tidy
from .manifest import damage

BEST = "best.json"
"""In the checkpoint `best`: its metric, value and step."""


class RunCheckpoints:
    """What is in `checkpoints/` of a run directory, by steps."""

    def __init__(self, run: Path) -> None:
        """Take whose checkpoints; there may be none."""
        self.run, self.folder = run, run / "checkpoints"

    def of_step(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or will be."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Return the steps of which there are checkpoints, damaged ones too."""
        steps = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(step) for step in steps if step.isdecimal())

    @property
    def how_to_go_on(self) -> str:
        """What to do, as the end of a run says it."""
        return f"start it again with output_dir={self.run} and --resume auto to go on"

    def last_step(self) -> int | None:
        """Return the last step that a run may go on from, damaged or not; None: there is none."""
        return max((n for n in self.steps() if (self.of_step(n) / "state").is_dir()), default=None)

    def newest(self, *, on_base: bool = False) -> tuple[Path | None, list[str]]:
        """Find the last checkpoint that a run can go on from; damaged ones get another name.

        Args:
            on_base: they are of adapters on what is in `base`.

        Returns:
            The checkpoint; None: there never was one, and the run is not finished; and what is
            wrong with later ones.

        Raises:
            ValueError: there are some, and the run cannot go on from any.
        """
        for folder in (self.folder, self.run):
            tidy(folder)
        damaged: dict[Path, str] = {}
        why: list[str] = []
        for step in reversed(self.steps()):
            path = self.of_step(step)
            problem = damage(path)
            if problem is not None:
                damaged[path] = problem
                why.append(f"{path.name}: {problem}")
            elif (path / "state").is_dir():
                self._check_base(needed=on_base)
                return path, [
                    self._put_aside(*each, "the run goes on from the one before it")
                    for each in damaged.items()
                ]
            else:
                why.append(f"{path.name} is a model alone, as save_only_model has it")
        why += [f"{path.name} is damaged" for path in sorted(self.folder.glob("damaged-*"))]
        if why:
            raise ValueError(
                f"output_dir: the run in {self.run} has no checkpoint to go on from "
                f"({'; '.join(why)}); put one back, or begin a new run in another output_dir"
            )
        if (self.run / "summary.json").is_file():
            raise ValueError(
                f"output_dir: the run in {self.run} is finished and has no checkpoint to go on "
                "from; train on from where it ended in a new run, with model_name_or_path: "
                f"{self.run}/final and another output_dir"
            )
        return None, []

    def _check_base(self, *, needed: bool) -> None:
        """Refuse what adapters were put on if it is damaged: there is no other one."""
        base = self.run / "base"
        missing = "it is missing" if needed else None
        problem = damage(base) if base.is_dir() else missing
        if problem is not None:
            raise ValueError(
                f"output_dir: {base}, which the adapters of the run were put on, is damaged: "
                f"{problem}; put it back, or begin a new run in another output_dir"
            )

    def take_back(self, step: int) -> None:
        """Delete those of later steps, which come again."""
        for later in self.steps():
            if later > step:
                remove_checkpoint(self.of_step(later))

    def remove_old(self, limit: int | None) -> list[str]:
        """Delete all but the newest `limit` that are whole; None: keep all.

        Returns:
            What is wrong with others, which were found damaged and have another name now.
        """
        told: list[str] = []
        kept = 0
        for step in [] if limit is None else reversed(self.steps()):
            path = self.of_step(step)
            # All of it is read when a run goes on from it; here it would be at every save.
            problem = damage(path, read=False)
            if problem is not None:
                told.append(self._put_aside(path, problem, "it does not count to save_total_limit"))
            elif kept < (limit or 0):
                kept += 1
            else:
                remove_checkpoint(path)
        return told

    @staticmethod
    def _put_aside(path: Path, problem: str, follows: str) -> str:
        """Give a damaged checkpoint another name, and say so."""
        name = put_aside(path).name
        return (
            f"checkpoint {path.name} is damaged ({problem}) and is called {name} from now on; "
            f"{follows}"
        )
