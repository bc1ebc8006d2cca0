"""The command line: `fastgrpo train config.yaml [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .config import ConfigError, TrainConfig, load_config

if TYPE_CHECKING:
    from .trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 2 wrong input, 130 interrupted."""
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
    where = "nothing was written"
    try:
        config = load_config(options.config, options.overrides)
        trainer = build_trainer(config, Path(options.config).stem)
        where = f"what was written is in {trainer.run.path}"
        trainer.train()
    except ConfigError as error:
        print(f"fastgrpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastgrpo: interrupted; {where}", file=sys.stderr)
        return 130
    return 0


def build_trainer(config: TrainConfig, run_name: str) -> Trainer:
    """Load and check what the configuration names; nothing is written before all of it is there.

    Raises:
        ConfigError: something does not exist or does not fit; the message says what to do.
    """
    from .trainer import Trainer

    try:
        return Trainer(config, run_name=run_name)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
