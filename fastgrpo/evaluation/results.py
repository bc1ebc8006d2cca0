"""What is left of an evaluation: a file of estimates, one of completions, a table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..console import Console
from ..json_lines import append_lines, plain
from ..readable import number
from ..run_directory import versions
from ..samples import Sample
from .estimates import Estimate
from .measures import Verdict


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured, and what came of it; the keys of the JSON file."""

    checkpoint: str
    split: str
    num_prompts: int
    num_samples: int
    """Of each prompt."""
    temperature: float
    judge: str
    threshold: float | None
    seed: int
    metrics: Mapping[str, Estimate]
    """Shares, by `pass@k` and `maj@k`."""
    num_not_judged: int
    """Completions that the judge did not judge."""
    num_seen_in_training: int | None
    """Prompts that are among those trained on; None: these could not be loaded."""
    averages: Mapping[str, float]
    """Rewards and lengths over all completions, named as in metrics.jsonl."""
    seconds: float

    def flat(self) -> dict[str, Any]:
        """Return what the file holds; what is no number is null."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return plain(dataclasses.asdict(self) | {"time": time, "versions": versions()})


def write_completions(
    folder: Path,
    subject: str,
    samples: Sequence[Sample],
    verdicts: Sequence[Verdict],
    num_samples: int,
    reward_names: Sequence[str],
) -> Path:
    """Write the completions of P prompts, B = P * n; return the path.

    The file is `SUBJECT.jsonl`, or has a number if it, or the estimates beside it, exist.

    Args:
        folder: made if it is not there.
        subject: what was measured, as it may stand in a name of a file.
        samples: (B,) those of a prompt next to each other.
        verdicts: (B,) what is held of them.
        num_samples: n.
        reward_names: of the reward functions.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _new(folder, re.sub(r"[^\w.-]+", "_", subject))  # final-test[:100]
    append_lines(
        path,
        (
            {
                "row": i // num_samples,
                **sample.line(reward_names),
                "answer": verdict.answer,
                "right": verdict.right,
            }
            for i, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True))
        ),
    )
    return path


def write(completions: Path, results: Results) -> Path:
    """Write the estimates beside the completions they are of; return the path.

    Raises:
        OSError: they cannot be written.
    """
    path = completions.with_suffix(".json")
    path.write_text(json.dumps(results.flat(), indent=2) + "\n", encoding="utf-8")
    return path


def _new(folder: Path, name: str) -> Path:
    """Make a file of a name that neither completions nor estimates have yet."""
    for count in itertools.count(1):
        path = folder / f"{name}{'' if count == 1 else f'-{count}'}.jsonl"
        if not path.with_suffix(".json").exists():
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path
    raise AssertionError("numbers do not end")


def show(console: Console, results: Results, reward_names: Sequence[str], name: str) -> None:
    """Print what was measured as a table.

    Args:
        console: where.
        results: what.
        reward_names: of the reward functions.
        name: of the run or configuration.
    """
    right = "" if results.threshold is None else f" (right from {results.threshold:g} on)"
    title = (
        f"{results.checkpoint} of {name} on {results.split}: {results.num_prompts:,} prompts × "
        f"{results.num_samples:,}, temperature {results.temperature:g}, judge "
        f"{results.judge}{right}"
    )
    rows = [
        [measure, f"{e.value:.1%}", f"{e.low:.1%} to {e.high:.1%}", f"{e.num_prompts:,}"]
        for measure, e in results.metrics.items()
    ]
    averages = {f"reward {name}": f"rewards/{name}/mean" for name in reward_names}
    averages |= {"tokens of a completion": "completions/mean_length"}
    rows += [[what, number(results.averages[key]), "", ""] for what, key in averages.items()]
    rows.append(["truncated", f"{results.averages['completions/clipped_ratio']:.1%}", "", ""])
    console.table(title, ["", "mean", "95% interval", "prompts"], rows)
