"""Load a reward function, call it, check what it returns: in this process or in one of its own.

`worker.py` imports this module without its package, so that a process for a function of three lines
imports no torch: nothing but the standard library is imported here, and what is returned are plain
types.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypedDict

from .values import Refused, Value, brief, checked, encoded

Source = tuple[Literal["name"], str] | tuple[Literal["made"], tuple[str, dict[str, Any]]] | tuple[
    Literal["dill"], bytes
]  # fmt: skip
"""Where a function is: 'module:function' or 'path.py:function'; what such a function returns for
some arguments; or the function itself, written by dill."""
Kind = Literal["exceptions", "timeouts", "invalid"]
"""How a function failed: it ended or raised something; took too long; gave what is no rewards. The
metric that counts it ends in this word."""

_HERE, _LIBRARY = os.path.dirname(__file__), os.path.dirname(os.__file__)


class Traits(TypedDict):
    """What is known of a function before it is called."""

    name: str
    takes: list[str] | None
    """The arguments it names; None: any, as it has **columns."""
    needs: list[str]
    """Those without a default."""


class Failure(TypedDict):
    """Why a function gave no rewards."""

    kind: Kind
    what: str
    """What it did, to follow its name in a sentence."""
    where: str
    """File, line and function in the user's code, or nothing."""
    traceback: str


class Outcome(TypedDict):
    """What came of calling a function on a batch."""

    values: list[Value]  # one a completion; none at all after a failure
    metrics: list[tuple[str, float]]
    extra: dict[str, list[Any]]
    failure: Failure | None


def failed(kind: Kind, what: str, where: str = "", trace: str = "") -> Outcome:
    """Return the outcome of a call that gave no rewards."""
    failure = Failure(kind=kind, what=what, where=where, traceback=trace)
    return Outcome(values=[], metrics=[], extra={}, failure=failure)


class TookTooLong(Exception):
    """Raised within a function that keeps to reward_timeout itself; carries the seconds."""


def expired(seconds: float, where: str = "") -> Outcome:
    """Return the outcome of a call that took longer than reward_timeout."""
    return failed("timeouts", f"took longer than reward_timeout: {seconds:g} s", where)


def load(source: Source) -> Callable[..., Any]:
    """Return the function that a source stands for.

    Raises:
        ValueError: there is no such function, or importing its module raised something.
        ModuleNotFoundError, FileNotFoundError: there is no such module or file.
    """
    if source[0] == "name":
        return _find(source[1])
    try:
        if source[0] == "made":
            name, options = source[1]
            return _find(name)(**options)
        return importlib.import_module("dill").loads(source[1])
    except Exception as error:
        what, where, _ = describe(error)
        raise ValueError(f"a reward function could not be made: {what}{where}") from error


def _find(name: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    except _NotThere as error:
        raise error.args[0] from None
    except Exception as error:
        what, where, _ = describe(error)
        raise ValueError(f"function {name!r}: importing it raised {what}{where}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"function {name!r}: {place!r} has no function {attribute!r}")
    return function


class _NotThere(Exception):
    """Carries the error that says so: the user's module may raise one of the same type."""


def _import(module: str) -> ModuleType:
    # Last, so that no folder in the working directory is taken for an installed package.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but imports one that is not must say so itself.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        missing = ModuleNotFoundError(
            f"no module {module!r}; install it, or name its file: 'path.py:function'"
        )
        raise _NotThere(missing) from error


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        missing = FileNotFoundError(
            f"no file {str(path)!r}; it is looked up from the working directory {str(Path.cwd())!r}"
        )
        raise _NotThere(missing)
    spec = importlib.util.spec_from_file_location(f"fastgrpo_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def traits_of(function: Callable[..., Any]) -> Traits:
    """Return the name of a function, as TRL names it, and the arguments it takes."""
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    name = getattr(named, "__name__", type(named).__name__)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a function written in C
        return Traits(name=name, takes=None, needs=[])
    takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needs = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Traits(name=name, takes=None if takes_any else takes, needs=needs)


def taken(arguments: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    """Return those of some arguments that a function takes."""
    takes = traits["takes"]
    return {name: x for name, x in arguments.items() if takes is None or name in takes}


def own(value: Any) -> Any:
    """Return a value whose lists and mappings a function may change without others seeing it."""
    if type(value) is list:
        return [own(x) for x in value]
    if type(value) is dict:
        return {name: own(x) for name, x in value.items()}
    return value


class Call:
    """One call of a function on a batch."""

    def __init__(
        self,
        function: Callable[..., Any],
        traits: Traits,
        arguments: Mapping[str, Any],
        lengths: Sequence[int],
    ) -> None:
        """Call it; a coroutine is left to `finish`."""
        self._lengths = lengths
        self._metrics: list[tuple[str, float]] = []
        self._extra: dict[str, list[Any]] = {}
        self._failure: Outcome | None = None
        self._values: Any = None
        given = {**arguments, "log_metric": self._log_metric, "log_extra": self._log_extra}
        try:
            self._values = function(**{name: own(x) for name, x in taken(given, traits).items()})
        except TookTooLong as error:
            self._failure = expired(*error.args)
        except (Exception, SystemExit) as error:
            self._fail(error)

    def _log_metric(self, name: str, value: float) -> None:
        self._metrics.append((str(name), float(value)))

    def _log_extra(self, column: str, values: Iterable[Any]) -> None:
        self._extra.setdefault(str(column), []).extend(values)

    def _fail(self, error: BaseException) -> None:
        what, where, trace = describe(error)
        self._failure = failed("exceptions", f"raised {what}", where, trace)

    @property
    def waits(self) -> bool:
        """Whether the function is a coroutine's, to be awaited."""
        return inspect.isawaitable(self._values)

    async def finish(self) -> None:
        """Await what the function returned."""
        import asyncio  # takes a tenth of a worker's start

        assert isinstance(self._values, Awaitable)
        try:
            self._values = await self._values
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                raise  # by Ctrl-C, and not by the function
            self._values = None
            self._fail(error)

    def outcome(self) -> Outcome:
        """Return the checked result."""
        if self._failure is not None:
            return self._failure
        count = len(self._lengths)
        try:
            values = checked(self._values, self._lengths)
            for column, entries in self._extra.items():
                if len(entries) != count:
                    raise Refused(
                        f"logged {len(entries)} values of {column!r} for {count} completions; "
                        "give log_extra one for each"
                    )
        except Refused as error:
            return failed("invalid", str(error))
        except Exception as error:  # of the methods of what it returned
            what, where, trace = describe(error)
            return failed(
                "invalid",
                f"returned what cannot be read ({what}); return a list of numbers",
                where,
                trace,
            )
        try:
            encoded(self._extra)
        except Exception as error:
            what = f"gave log_extra what JSON has nothing for ({describe(error)[0]})"
            return failed("invalid", f"{what}; give it plain values")
        return Outcome(values=values, metrics=self._metrics, extra=self._extra, failure=None)


def call_all(
    functions: Sequence[tuple[Callable[..., Any], Traits]],
    arguments: Mapping[str, Any],
    lengths: Sequence[int],
    run: Callable[[Coroutine[Any, Any, None]], None],
) -> list[Outcome]:
    """Call functions one after the other, then await together those that are async.

    Args:
        functions: with what is known of each.
        arguments: of every call, without those that log.
        lengths: tokens of each completion.
        run: runs a coroutine to its end.
    """
    calls = [Call(function, traits, arguments, lengths) for function, traits in functions]
    waiting = [call for call in calls if call.waits]
    if waiting:
        run(_finish(waiting))
    return [call.outcome() for call in calls]


async def _finish(calls: Sequence[Call]) -> None:
    import asyncio  # takes a tenth of a worker's start

    await asyncio.gather(*(call.finish() for call in calls))


def describe(error: BaseException) -> tuple[str, str, str]:
    """Return what a traceback says in the end, where in the user's code it was, and all of it."""
    # Before it are the lines of a SyntaxError, indented; after it, notes.
    only = traceback.format_exception_only(error)
    what = next((line for line in only if not line.startswith(" ")), only[-1]).strip()
    frames = traceback.extract_tb(error.__traceback__)
    return brief(what), place(frames), brief("".join(traceback.format_exception(error)), 10_000)


def place(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return `, at file:line in function: text` of the last frame of the user's own code."""
    frames = [f for f in frames if not f.filename.startswith(("<frozen", _HERE))]
    own = [f for f in frames if not _is_library(f.filename)] or frames
    if not own:
        return ""
    frame = own[-1]
    below = Path(frame.filename).is_relative_to(Path.cwd())
    file = os.path.relpath(frame.filename) if below else frame.filename
    return f", at {file}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")


def _is_library(file: str) -> bool:
    packages = {"site-packages", "dist-packages"}
    return file.startswith(_LIBRARY) or not packages.isdisjoint(Path(file).parts)
