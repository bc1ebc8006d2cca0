"""The command line: `fastgrpo train config.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
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
    train_parser.add_argument("config", help="a YAML file; the repository has some in configs/")
    train_parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example learning_rate=3e-6"
    )
    options = parser.parse_args(arguments)
    try:
        return train(options.config, options.overrides)
    except KeyboardInterrupt:
        print("fastgrpo: interrupted before anything was written", file=sys.stderr)
        return 130


def train(config_file: str, overrides: Sequence[str]) -> int:
    """Train as a file and overrides say; errors that are the user's to mend are one sentence."""
    print(f"fastgrpo: loading {config_file}", file=sys.stderr, flush=True)
    # Imported here, where an impatient Ctrl-C is caught: they take seconds.
    from .config_file import load_config
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
    except KeyboardInterrupt:
        print(f"fastgrpo: interrupted\nrun directory: {trainer.run.path}", file=sys.stderr)
        return 130
    return 0
