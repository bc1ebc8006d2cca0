"""The command line: `fastgrpo train config.yaml [key=value ...]`, and `plan` before it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 done, 1 the run failed, 2 wrong input and nothing written, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="fastgrpo", description="GRPO on one GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model; the run directory is printed at the end.",
    )
    plan_parser = commands.add_parser(
        "plan",
        help="say how much GPU memory a run will take",
        description="Say how much GPU memory a run will take, what else would fit and what would "
        "save most. Reads the model's config.json, no weights.",
    )
    for command in (train_parser, plan_parser):
        command.add_argument("config", help="a YAML file; the repository has some in configs/")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example learning_rate=3e-6"
        )
    plan_parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="for example 24GiB; without it, this machine's GPU"
    )
    plan_parser.add_argument(
        "--prompt-length",
        type=int,
        metavar="TOKENS",
        help="of the longest prompt; without it, from a local dataset, else 512",
    )
    # Overrides may come after options, which argparse takes for unknown arguments.
    options, late = parser.parse_known_args(arguments)
    unknown = [argument for argument in late if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    overrides = [*options.overrides, *late]
    # At every import bitsandbytes misses a kernel for CPUs that is not needed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if options.command == "plan":
            return plan(options.config, overrides, options.gpu_memory, options.prompt_length)
        return train(options.config, overrides)
    except KeyboardInterrupt:
        print("fastgrpo: interrupted before anything was written", file=sys.stderr)
        return 130


def train(config_file: str, overrides: Sequence[str]) -> int:
    """Train as a file and overrides say; errors that are the user's to mend are one sentence."""
    print(f"fastgrpo: loading {config_file}", file=sys.stderr, flush=True)
    # Imported here, where an impatient Ctrl-C is caught: they take seconds.
    from torch import OutOfMemoryError

    from .config import load_config
    from .rewards import RewardError
    from .trainer import Trainer

    try:
        config = load_config(config_file, overrides)
        trainer = Trainer(config, run_name=Path(config_file).stem)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastgrpo: {error}", file=sys.stderr)
        return 2
    try:
        trainer.train()
    except (RewardError, FloatingPointError) as error:
        print(f"fastgrpo: {error}\nrun directory: {trainer.run.path}", file=sys.stderr)
        return 1
    except OutOfMemoryError as error:
        print(
            f"fastgrpo: {error}\n`fastgrpo plan {config_file}` says what takes memory, and which "
            f"line of the configuration would save most\nrun directory: {trainer.run.path}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"fastgrpo: interrupted\nrun directory: {trainer.run.path}", file=sys.stderr)
        return 130
    return 0


def plan(
    config_file: str, overrides: Sequence[str], gpu_memory: str | None, prompt_length: int | None
) -> int:
    """Print how much memory a run will take; whether it fits or not, the status is 0."""
    print(f"fastgrpo: planning {config_file}", file=sys.stderr, flush=True)
    from .config import load_config
    from .memory.report import print_plan

    try:
        config = load_config(config_file, overrides)
        print_plan(config, gpu_memory=gpu_memory, prompt_length=prompt_length)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastgrpo: {error}", file=sys.stderr)
        return 2
    return 0
