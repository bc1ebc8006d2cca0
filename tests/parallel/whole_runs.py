"""Whole runs, by any number of processes; started by torchrun.

`torchrun --nproc-per-node 2 tests/parallel/whole_runs.py CONFIG.yaml...`: what judges note of a run
goes to the directory SEEN, named like its configuration.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch

from fastgrpo.config import load_config
from fastgrpo.distributed import leave_world
from fastgrpo.trainer import Trainer


def main(paths: list[str]) -> None:
    for path in paths:
        os.environ["SEEN"] = path.removesuffix(".yaml") + " seen"
        os.makedirs(os.environ["SEEN"], exist_ok=True)
        Trainer(load_config(path)).train()
    leave_world()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and memory that is not initialised is NaN
    warnings.simplefilter("error")
    main(sys.argv[1:])
