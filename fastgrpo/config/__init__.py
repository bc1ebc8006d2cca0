"""The configuration of a run: flat YAML, with the names TRL and transformers use."""

from .checks import ConfigError as ConfigError
from .file import check_overrides_of_eval as check_overrides_of_eval
from .file import config_from as config_from
from .file import load_config as load_config
from .file import suggestion as suggestion
from .output import is_due as is_due
from .parallel import resolve_parallel as resolve_parallel
from .train import LOSS_KEYS as LOSS_KEYS
from .train import EvalConfig as EvalConfig
from .train import TrainConfig as TrainConfig
