"""What a run leaves behind on its way: checkpoints, and the base that adapters were put on."""

from __future__ import annotations

from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING

from .checkpoint import begin_checkpoint, finish_checkpoint, name_base, nameless_base
from .signals import Stopped
from .training_state import can_be_saved, save_state

if TYPE_CHECKING:
    from .trainer import Trainer


def save(trainer: Trainer, path: Path, *, state: bool = False) -> None:
    """Write a Hugging Face checkpoint; all ranks call it.

    Args:
        trainer: whose model.
        path: its directory.
        state: with what the run needs to go on from it.
    """
    policy, world = trainer.policy, trainer.world
    aside = world.on_main(lambda: begin_checkpoint(path))
    if state:
        save_state(aside / "state", trainer)
    parameters = policy.state_dict(policy.model)
    world.on_main(
        lambda: finish_checkpoint(
            path, aside, policy.model, policy.tokenizer, state_dict=parameters
        )
    )


def save_step(trainer: Trainer) -> None:
    """Write the checkpoint of the step that has been taken, and delete those that are too old."""
    run, step, limit = trainer.run, trainer.step, trainer.config.save_total_limit
    save(trainer, run.path / "checkpoints" / f"step-{step}", state=saves_state(trainer))
    trainer.saved_step = step
    trainer.world.on_main(lambda: run.remove_old_checkpoints(limit))


def saves_state(trainer: Trainer) -> bool:
    """Say whether checkpoints hold what the run needs to go on from them."""
    return can_be_saved(trainer.learner) and not trainer.config.save_only_model


def save_base(trainer: Trainer) -> None:
    """Save what adapters were put on, if there is no name to load it by."""
    policy, base = trainer.policy, nameless_base(trainer.policy.model)
    if base is not None:
        path, parameters = trainer.run.base, policy.state_dict(base)
        trainer.world.on_main(lambda: name_base(path, policy.model, policy.tokenizer, parameters))


def leave(trainer: Trainer, number: int) -> Stopped:
    """Save a run where it is, whatever `save_strategy` says; return what says so.

    Args:
        trainer: whose run.
        number: the signal that it stops for.
    """
    if trainer.saved_step != trainer.step:
        save_step(trainer)
    path = trainer.run.path
    text = f"stopped by {Signals(number).name} after step {trainer.step}"
    text += f", saved in {path}/checkpoints/step-{trainer.step}"
    if saves_state(trainer):
        text += f"; start it again with output_dir={path} and --resume auto to go on"
    else:
        text += ", the model alone: there is no going on from it"
    return Stopped(number, text)
