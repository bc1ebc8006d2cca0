"""Rewards: the functions and models that judge completions, the built-in ones and the user's."""

from .built_in import BUILT_IN as BUILT_IN
from .built_in import accuracy as accuracy
from .built_in import format as format
from .built_in import soft_overlong_punishment as soft_overlong_punishment
from .built_in import tag_count as tag_count
from .contract import Completion as Completion
from .contract import RewardError as RewardError
from .contract import RewardFunction as RewardFunction
from .contract import Scores as Scores
from .contract import Steps as Steps
from .contract import decode_completions as decode_completions
from .judges import Judges as Judges
from .models import RewardModel as RewardModel
from .models import reward_model_bytes as reward_model_bytes
