"""The planner: how much GPU memory a run will take, before any weight is loaded."""

from .plan import Device as Device
from .plan import Plan as Plan
from .plan import Planner as Planner
from .search import largest_values as largest_values
from .search import switches as switches
