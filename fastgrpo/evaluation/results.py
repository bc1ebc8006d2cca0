"""What is left of an evaluation: a file of estimates, one of completions, a table."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import Console
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
    averages: Mapping[str, float]
    """Rewards and lengths over all completions, named as in metrics.jsonl."""
    seconds: float

    def flat(self) -> dict[str, Any]:
        """Return what the file holds; what is no number is null."""
        values = dataclasses.asdict(self) | {"versions": versions()}
        values["averages"] = {name: _plain(value) for name, value in self.averages.items()}
        return values


def write(
    folder: Path,
    results: Results,
    samples: Sequence[Sample],
    verdicts: Sequence[Verdict],
    reward_names: Sequence[str],
) -> Path:
    """Write the estimates, and beside them the completions; return the path of the former.

    The files are `CHECKPOINT-SPLIT.json` and `.jsonl`, or with a number if these exist.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = re.sub(r"[^\w.-]+", "_", results.split)  # test[:100]
    name = f"{Path(results.checkpoint).name}-{split}"
    for path in _names(folder, name):
        try:
            # A half of a character, which UTF-8 has no bytes for, becomes its JSON escape.
            with path.with_suffix(".jsonl").open(
                "x", encoding="utf-8", errors="backslashreplace"
            ) as file:
                for i, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True)):
                    line = {
                        "row": i // results.num_samples,
                        **sample.line(reward_names),
                        "answer": verdict.answer,
                        "right": verdict.right,
                    }
                    file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        except FileExistsError:
            continue
        path.write_text(json.dumps(results.flat(), indent=2) + "\n", encoding="utf-8")
        return path
    raise AssertionError("names do not end")


def _names(folder: Path, name: str) -> Iterator[Path]:
    count = 1
    while True:
        path = folder / f"{name}{'' if count == 1 else f'-{count}'}.json"
        if not path.exists():
            yield path
        count += 1


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


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
