"""The command line: `fastgrpo plan`, `train`, `eval`, `report` and `replay`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .readable import plain
from .signals import exit_status, handled, interrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 done, 1 the run failed, 2 wrong input and nothing written, 128 + N ended by signal N: 130
    Ctrl-C, 143 SIGTERM, 138 SIGUSR1 (on Linux).
    """
    parser = argparse.ArgumentParser(prog="fastgrpo", description="GRPO, on one GPU or several.")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model; the run directory is printed at the end.",
        epilog="Ctrl-C, SIGTERM and SIGUSR1 stop a run after the step it is in and save it; a "
        "second one ends it at once. Exit status: 0 done, 1 the run failed, 2 wrong input and "
        "nothing written, 128 + N stopped by signal N (130 by Ctrl-C, 143 by SIGTERM).",
    )
    plan_parser = commands.add_parser(
        "plan",
        help="say how much GPU memory a run will take",
        description="Say how much GPU memory a run will take, what else would fit and what would "
        "save most. Reads the model's config.json, no weights.",
    )
    eval_parser = commands.add_parser(
        "eval",
        help="measure a model on held-out prompts",
        description="Measure the model of a run on held-out prompts: pass@k, majority votes, "
        "rewards and lengths, as a table and as files in the run directory.",
    )
    report_parser = commands.add_parser(
        "report",
        help="write a run as one HTML page",
        description="Write a run, finished or going on, as one HTML page; its path is printed.",
    )
    replay_parser = commands.add_parser(
        "replay",
        help="run a step again that was not taken",
        description="Run a step again that was not taken since its numbers had gone wrong, and say "
        "where they do so; key=value, dtype=float32 for example, to see what it depends on.",
    )
    replay_parser.add_argument("step", help="bad_steps/step-N of a run directory")
    eval_parser.add_argument(
        "run", help="a run directory, or a configuration, whose model is then measured untrained"
    )
    for command in (train_parser, plan_parser):
        command.add_argument("config", help="a YAML file; the repository has some in configs/")
    for command in (train_parser, plan_parser, eval_parser, replay_parser):
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
    train_parser.add_argument(
        "--resume",
        choices=["auto"],
        help="auto: go on from the newest checkpoint in output_dir; begin if there is none",
    )
    _add_eval_options(eval_parser)
    report_parser.add_argument("run", help="a run directory")
    report_parser.add_argument(
        "--out", metavar="FILE", help="the page; without it, report.html in the run directory"
    )
    # Overrides may come after options, which argparse takes for unknown arguments.
    options, late = parser.parse_known_args(arguments)
    unknown = [argument for argument in late if argument.startswith("-")]
    if unknown:
        given = list(sys.argv[1:] if arguments is None else arguments)
        hints = "" if options.command == "report" else _as_overrides(unknown, given)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hints}")
    if late and options.command == "report":
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    overrides = [*getattr(options, "overrides", []), *late]
    # As it is imported bitsandbytes misses a kernel for CPUs that is not needed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with handled(interrupt):
            return _run(options, overrides)
    except KeyboardInterrupt as error:
        complain("interrupted before anything was written")
        return exit_status(error)


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the command that is asked for."""
    if options.command != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK") == "0":
            complain(f"{options.command}: is for one process; leave torchrun out")
        return 2
    if options.command == "plan":
        return plan(options.config, overrides, options.gpu_memory, options.prompt_length)
    if options.command == "eval":
        return evaluate(options, overrides)
    if options.command == "replay":
        return replay(options.step, overrides)
    if options.command == "report":
        return report(options.run, options.out)
    from .train_command import train

    return train(options.config, overrides, resume=options.resume == "auto")


def _as_overrides(unknown: Sequence[str], arguments: Sequence[str]) -> str:
    """Return how options that look like keys of a configuration are written."""
    from .config import suggestion

    said: list[str] = []
    for option in unknown:
        name, equals, value = option.lstrip("-").partition("=")
        following = [*arguments[arguments.index(option) + 1 :], "-"][0]
        if not equals and not following.startswith("-") and "=" not in following:
            value = following
        key = suggestion(name)
        if key is not None:
            said.append(f"{key}={value or 'VALUE'}")
    return f"; keys of the configuration are written {' '.join(said)}" if said else ""


def complain(error: BaseException | str, *more: str) -> None:
    """Say what is wrong; of texts that others wrote only what a terminal does not obey."""
    print(f"fastgrpo: {plain(str(error))}", *more, sep="\n", file=sys.stderr)


def _add_eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="final (default of a run), best, step-N, base (before training), or the directory or "
        "Hub name of another model",
    )
    parser.add_argument(
        "-n",
        "--num-samples",
        type=int,
        metavar="N",
        help="completions of each prompt; without it, as many as in training",
    )
    parser.add_argument(
        "-k",
        type=_whole_numbers,
        dest="ks",
        metavar="K,K,...",
        help="of pass@k and maj@k; without it, 1 and N",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 decodes greedily; default: as in training"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of the dataset; default: the configuration's test split"
    )
    parser.add_argument(
        "--max-samples", type=int, metavar="M", help="measure the first M prompts alone"
    )
    parser.add_argument(
        "--judge",
        metavar="NAME",
        help="the reward function that says what is right; default: the first",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="REWARD", help="least reward of a right answer"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="for the results; default: eval/ of the run, or runs/eval-NAME/ of a configuration",
    )


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"give whole numbers such as 1,4,8, not {text!r}"
        ) from None


def plan(
    config_file: str, overrides: Sequence[str], gpu_memory: str | None, prompt_length: int | None
) -> int:
    """Print how much memory a run will take; whether it fits or not, the status is 0."""
    print(f"fastgrpo: planning {config_file}", file=sys.stderr, flush=True)
    from .config import load_config

    try:
        config = load_config(config_file, overrides)
        from .memory.report import print_plan

        print_plan(config, gpu_memory=gpu_memory, prompt_length=prompt_length)
    except (ValueError, OSError, ImportError) as error:
        complain(error)
        return 2
    return 0


def evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Measure a model on held-out prompts."""
    print(f"fastgrpo: loading {options.run}", file=sys.stderr, flush=True)
    from torch import OutOfMemoryError

    from . import evaluation
    from .config import check_overrides_of_eval
    from .rewards import RewardError
    from .rollout_fn import RolloutError

    try:
        check_overrides_of_eval(overrides)
        names = (f.name for f in dataclasses.fields(evaluation.EvalOptions))
        asked = evaluation.EvalOptions(**{name: getattr(options, name) for name in names})
        evaluation.evaluate(options.run, asked, overrides)
    except (RewardError, RolloutError) as error:
        complain(error)
        return 1
    except OutOfMemoryError as error:
        advice = (
            "max_generation_batch_size=16, or another number, bounds the completions that are "
            "sampled at once"
        )
        complain(error, advice)
        return 1
    except KeyboardInterrupt as error:
        complain("interrupted")
        return exit_status(error)
    except (ValueError, OSError, ImportError) as error:
        complain(error)
        return 2
    return 0


def replay(step: str, overrides: Sequence[str]) -> int:
    """Print what comes of a step that was not taken; whether it goes wrong again, the status is 0.

    Wrong input is told in one sentence.
    """
    print(f"fastgrpo: loading {step}", file=sys.stderr, flush=True)
    try:
        from . import replay as again

        for line in again.show(again.replay(step, overrides)):
            print(plain(line))
    except (ValueError, OSError, ImportError) as error:
        complain(error)
        return 2
    return 0


def report(run: str, out: str | None) -> int:
    """Write the page of a run and print its path."""
    try:
        from .report import write_report

        print(write_report(Path(run), None if out is None else Path(out)))
    except (ValueError, OSError, ImportError) as error:
        complain(error)
        return 2
    return 0
