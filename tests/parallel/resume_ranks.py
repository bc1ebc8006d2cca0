"""One of several processes that train, or go on with, run after run; started by torchrun.

`torchrun --nproc-per-node N tests/parallel/resume_ranks.py JOBS`: a JSON file with a list of
configurations, of which those with `resume` go on in their directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import config_from
from fastgrpo.distributed import join_world, leave_world
from fastgrpo.trainer import Trainer


def train(values: dict[str, Any]) -> Trainer:
    """Run a configuration to its end."""
    resume = values.pop("resume", False)
    trainer = Trainer(config_from(values), resume=resume)
    trainer.train()
    return trainer


def main(jobs: list[dict[str, Any]]) -> None:
    join_world()
    for values in jobs:
        train(values)
    leave_world()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # and memory that is not initialised is NaN
    main(json.loads(Path(sys.argv[1]).read_text()))
