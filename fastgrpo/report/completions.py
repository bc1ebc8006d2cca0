"""The completions a reader of the page can look at: as many as fit, spread over the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from .files import Line, number

MOST_CHARACTERS = 12_000
"""Of one text; of a longer one the beginning and the end are shown."""
MOST_BYTES = 1_800_000
"""Of all completions on the page."""
LEAST_STEPS = 20
"""Steps that all have a part of it, however many completions each of them logged."""


def browsable(lines: Sequence[Line]) -> dict[str, Any]:
    """Return prompts and completions as the page's script reads them, and what was left out.

    A prompt is there once, whichever number of completions it has.
    """
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        steps.setdefault(line["step"], []).append(_entry(line))
    ends = {step: list(accumulate(_sizes(found))) for step, found in steps.items()}
    if sum(each[-1] for each in ends.values()) > MOST_BYTES:
        room = MOST_BYTES // min(len(steps), LEAST_STEPS)
        fitting = {step: [end for end in each if end <= room] for step, each in ends.items()}
        ends = {step: each for step, each in fitting.items() if each}
    chosen = _spread({step: each[-1] for step, each in ends.items()})
    entries = [entry for step in chosen for entry in steps[step][: len(ends[step])]]
    prompts: dict[str, int] = {}
    for entry in entries:
        entry["prompt"] = prompts.setdefault(json.dumps(entry["prompt"]), len(prompts))
    return {
        "prompts": [json.loads(prompt) for prompt in prompts],
        "completions": entries,
        "steps": chosen,
        "num_steps": len(steps),
        "num_completions": len(lines),
        "cut": sum(map(len, ends.values())) < len(lines),  # of a step not all are there
        "rewards": list(dict.fromkeys(name for entry in entries for name in entry["rewards"])),
    }


def _sizes(entries: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Yield what each entry adds to the page; a prompt counts with the first that has it."""
    prompts: set[str] = set()
    for entry in entries:
        # As the page has it: in JSON of ASCII, in which what could be markup is escaped too.
        prompt, rest = (htmlsafe_json_dumps(x) for x in (entry["prompt"], entry | {"prompt": 1e9}))
        yield len(rest) + (0 if prompt in prompts else len(prompt) + 2)
        prompts.add(prompt)


def _spread(size: dict[int, int]) -> list[int]:
    """Return the first, the last and evenly spread steps between them whose sizes fit."""
    steps = sorted(size)
    stride = 1
    while True:
        chosen = steps[::stride]
        if steps and chosen[-1] != steps[-1]:
            chosen.append(steps[-1])
        if sum(size[step] for step in chosen) <= MOST_BYTES or stride >= len(steps):
            return chosen
        stride += 1


def _entry(line: Line) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "step": line["step"],
        "prompt": _turns(line.get("prompt")),
        "completion": _turns(line.get("completion")),
        "rewards": {
            name: value if number(value) else None
            for name, value in (line.get("rewards") or {}).items()
        },
    }
    advantage = line.get("advantage")
    if isinstance(advantage, list):
        entry["advantage"] = fmean([value for value in advantage if number(value)] or [0.0])
        entry["per_token"] = len(advantage)
    elif number(advantage):
        entry["advantage"] = advantage
    for name in ("num_tokens", "num_tool_tokens"):
        if number(line.get(name)):
            entry[name] = line[name]
    if isinstance(line.get("finished"), bool):
        entry["finished"] = line["finished"]
    if line.get("extra"):
        entry["extra"] = {name: _text(value) for name, value in line["extra"].items()}
    return entry


def _turns(value: Any) -> list[dict[str, str]]:
    """Return a text, or chat messages, as turns: who speaks ("" in a text), and what."""
    if not isinstance(value, list):
        return [{"role": "", "text": _text(value)}]
    turns: list[dict[str, str]] = []
    for message in value:
        if not isinstance(message, dict):
            turns.append({"role": "", "text": _text(message)})
            continue
        rest = {k: v for k, v in message.items() if k not in ("role", "content") and v}
        text = _text(message.get("content") or "")
        if rest:  # the calls of tools, for example
            text += ("\n" if text else "") + _text(rest)
        turns.append({"role": str(message.get("role", "")), "text": text})
    return turns


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[… {left_out:,} characters left out here …]\n{text[-half:]}"
