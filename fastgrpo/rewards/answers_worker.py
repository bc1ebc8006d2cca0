"""The process that runs math-verify for `answers.py`: started by path, so that it imports no torch.

It reads JSON lines of a limit in seconds and one or two answers, and writes whether it could read
the one, or whether the two are equal. What takes too long ends it; what comes next starts another.
Answers are text of models: nothing in here evaluates them as code (`arithmetic`), and whatever they
make SymPy do, an audit hook refuses to open, start and write anything (`refuse`): a second wall
behind the first, no sandbox for code that runs already.
"""

import ast
import contextlib
import faulthandler
import functools
import importlib
import json
import logging
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import math_verify.parser
import sympy
import sympy.parsing.sympy_parser
from math_verify import parse, verify

MEMORY_BYTES = 4 << 30
"""Of address space, where the system can limit it; more is a MemoryError, and the answer wrong."""

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_READING = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")


def arithmetic(text: str, *_: Any, **__: Any) -> sympy.Expr:
    """Return numbers and what joins them: all of Python that answers may be written in.

    In place of SymPy's `parse_expr`, which would evaluate the text.

    Raises:
        ValueError: it holds anything else.
    """

    def made(node: ast.AST) -> sympy.Expr:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            number = ast.get_source_segment(text, node) or ""
            return sympy.Integer(node.value) if type(node.value) is int else sympy.Float(number)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](made(node.left), made(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](made(node.operand))
        raise ValueError("no arithmetic")

    with sympy.evaluate(False):
        return made(ast.parse(text.strip(), mode="eval").body)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what reading a formula never needs: an audit hook of the interpreter.

    Raises:
        PermissionError: a process is started, a file changed or a socket opened.
    """
    writes = event == "open" and bool((arguments[2] or 0) & _WRITING)
    elsewhere = event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes."))
    if writes or (elsewhere and event not in _READING):
        raise PermissionError(event)


@functools.lru_cache(maxsize=4096)
def read(text: str) -> list[Any]:
    """Return what math-verify makes of a text."""
    parsed = parse(text, parsing_timeout=0)
    for formula in parsed:
        if isinstance(formula, sympy.Basic):
            with contextlib.suppress(Exception):  # what it cannot do is not needed
                sympy.simplify(formula)  # as comparing does: a tower of powers hangs here, alone
    return parsed


def serve() -> None:
    """Answer until standard input ends. Signals are for the parent, which holds them back here."""
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing math-verify prints is taken for a reply
    forbid()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        limit_s, *texts = json.loads(line)
        # The watchdog ends the process even inside the C code of a huge power.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        try:
            parsed = [read(text) for text in texts]
            good = len(parsed) == 1 or bool(verify(parsed[0], parsed[1], timeout_seconds=0))
        except Exception:
            good = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(good), file=replies, flush=True)


def forbid() -> None:
    """Let this process do no more than read formulas, for good: what it reads is hostile."""
    importlib.import_module("sympy.physics.units")  # evaluates names of its own meanwhile
    sympy.parsing.sympy_parser.parse_expr = arithmetic
    math_verify.parser.parse_expr = arithmetic
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has such limits
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.addaudithook(refuse)


if __name__ == "__main__":
    serve()
