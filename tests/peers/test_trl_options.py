"""TRL's options and ours: the same names, the same defaults, but for those that differ on purpose.

`python tests/peers/test_trl_options.py` writes the options of the installed TRL to where the
default tests, which have no TRL, find them.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "trl_recipes" / "options.json"

# Defaults of ours that are not TRL's, and why.
ON_PURPOSE = {
    "use_bias_correction_kl": "off, as in the papers on GRPO",
    "lora_dropout": "0: else the policy trained is not the one that was sampled",
    "dataset_test_split": "none: a test split is measured before and after training if named",
    "reward_funcs": "`accuracy`: a run without any reward function is none",
    "per_device_eval_batch_size": "as many prompts as fill a training step",
}
# Defaults that are written in another way and mean the same.
SAME = {"report_to": ([], "none"), "epsilon_high": (0.2, None)}


def installed() -> dict[str, Any]:
    """Return the options of TRL's `grpo` command, with their defaults as YAML has them."""
    import transformers
    import trl
    from trl import GRPOConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig

    classes = (GRPOConfig, ModelConfig, GRPOScriptArguments, DatasetMixtureConfig)
    defaults = {c.__name__: {f.name: _default(f) for f in dataclasses.fields(c)} for c in classes}
    return {
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "defaults": defaults,
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    assert value is not dataclasses.MISSING
    return value.value if isinstance(value, enum.Enum) else value


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    pytest.importorskip("trl")
    return installed()


@pytest.fixture(scope="module")
def defaults(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x for each in options["defaults"].values() for name, x in each.items()}


@pytest.mark.peers
def test_the_written_options_are_those_of_this_version(options: dict[str, Any]) -> None:
    written = json.loads(FILE.read_text())
    versions = ("trl", "transformers")
    if [options[v] for v in versions] != [written[v] for v in versions]:
        pytest.skip(f"written for TRL {written['trl']}, transformers {written['transformers']}")
    assert options == written


@pytest.mark.peers
def test_no_option_of_the_installed_trl_is_dropped(defaults: dict[str, Any]) -> None:
    from test_trl_recipes import check_that_nothing_is_dropped

    check_that_nothing_is_dropped(defaults)


@pytest.mark.peers
def test_defaults_are_those_of_trl_but_on_purpose(defaults: dict[str, Any]) -> None:
    from fastgrpo.config import TrainConfig

    ours = TrainConfig().flat()
    shared = ours.keys() & defaults.keys()
    assert len(shared) > 80
    same = {n: (ours[n], defaults[n]) for n in shared if ours[n] != defaults[n]}
    differing = {name for name in same if same[name] != SAME.get(name)}
    assert differing == ON_PURPOSE.keys(), {name: same[name] for name in differing}
    # Under another name.
    assert ours["epsilon_low"] == defaults["epsilon"]


# What TRL's parser makes of options that are said in another way or worked out from others.
WORKED_OUT: dict[str, tuple[Any, Any]] = {
    "gsm8k_full.yaml steps_per_generation": (None, 2),
    "gsm8k_full.yaml optim": ("adamw_torch_fused", "adamw_torch"),
    "lora_vllm.yaml lora_target_modules": (None, "all-linear"),
    "lora_vllm.yaml top_k": (0, -1),
    "lora_vllm.yaml bf16": (None, True),
    "dapo.yaml attn_implementation": ("flash_attention_2", None),  # of model_init_kwargs
    "dapo.yaml warmup_steps": (0.02, 0),  # its parser leaves what is older aside
    "dapo.yaml bf16": (None, True),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::FutureWarning")  # some names are older ones
def test_recipes_mean_what_they_mean_to_trl(defaults: dict[str, Any]) -> None:
    """Every option that both have, as TRL's parser reads it, is ours, for each recipe."""
    from trl import GRPOConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    from fastgrpo.config import load_config

    found: dict[str, tuple[Any, Any]] = {}
    for path in (
        FILE.with_name(name) for name in ("gsm8k_full.yaml", "lora_vllm.yaml", "dapo.yaml")
    ):
        # A bare `no` is False to YAML, and refused by TRL.
        no = ["--eval_strategy", "no"] if "gsm8k" in path.name else []
        parser: Any = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
        parsed = parser.parse_args_and_config(
            ["--config", str(path), "--use_cpu", "true", *no], fail_with_unknown_args=False
        )
        theirs = {name: x for part in parsed for name, x in vars(part).items()}
        ours = load_config(path).flat()
        for name in ours.keys() & defaults.keys() & theirs.keys():
            value = theirs[name]
            both = ours[name], value.value if isinstance(value, enum.Enum) else value
            if both[0] != both[1] and both != SAME.get(name) and name not in ON_PURPOSE:
                found[f"{path.name} {name}"] = both
    assert found == WORKED_OUT


if __name__ == "__main__":
    FILE.write_text(json.dumps(installed(), indent=1) + "\n")
