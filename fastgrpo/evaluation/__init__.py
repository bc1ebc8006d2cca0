"""What `fastgrpo eval` does: sample a held-out split, estimate, write down.

pass@k, majority votes and their intervals are of use without the command, too.
"""

from .command import EvalOptions as EvalOptions
from .command import evaluate as evaluate
from .estimates import Estimate as Estimate
from .estimates import estimate as estimate
from .estimates import interval as interval
from .estimates import majority_at_k as majority_at_k
from .estimates import pass_at_k as pass_at_k
from .votes import group_answers as group_answers
