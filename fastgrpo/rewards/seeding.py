"""Seeds for the random numbers of the user's own functions.

Processes of reward functions read it too: nothing but the standard library is imported here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import random
import sys
from typing import Any

_MODULES = frozenset({"numpy.random", "torch"})
_last = 0


def seed_generators(number: int) -> None:
    """Seed the generators of random, NumPy and torch, so that what draws from them can be repeated.

    Args:
        number: from 0 to 2**63 - 1.
    """
    global _last
    _last = number
    random.seed(number)
    for name in _MODULES & sys.modules.keys():
        _seed(sys.modules[name], number)


def _seed(module: Any, number: int) -> None:
    if module.__name__ == "torch":
        module.manual_seed(number)
    else:
        module.seed(number % 2**32)


class SeedAtImport(importlib.abc.MetaPathFinder):
    """Seeds a module that a function imports only as it is called, first in `sys.meta_path`.

    Else the first call in a process would have other random numbers than the same call in one that
    is older.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Find such a module where it is found anyway, and have it seeded once it is executed."""
        if fullname not in _MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_seed(module: Any) -> None:
            execute(module)
            _seed(module, _last)

        loader.exec_module = execute_and_seed
        return spec
