"""YAML to values: safe, and nothing is taken silently for what it was not meant to be.

Of YAML 1.1 some numbers are left out, which are texts here: 010 would be 8, 1:30 would be 90, and
dates are no option's value.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..readable import named, shown
from .checks import ConfigError

MOST_BYTES = 1_000_000
"""Of a configuration; those of the repository have one or two thousand."""
_MOST_VALUES = 10_000
"""Those behind an alias count wherever it stands."""
_DEEPEST = 20
"""Levels of lists and pairs in each other."""
_LONGEST_NUMBER = 100
"""Characters."""

_TAG = "tag:yaml.org,2002:"
_INT = r"[-+]?(?:0|[1-9][0-9_]*)$"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|"
    r"\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without some of its numbers."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [rule for rule in rules if rule[0] in (_TAG + "bool", _TAG + "null", _TAG + "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_TAG + "float", re.compile(_FLOAT), list("-+0123456789."))
_Loader.add_implicit_resolver(_TAG + "int", re.compile(_INT), list("-+0123456789"))


def read_yaml(source: bytes | str) -> Any:
    """Return the value of a YAML text; nothing for an empty one.

    Raises:
        ConfigError: it has none; one sentence, that names the line and what to do.
    """
    try:
        text = source if isinstance(source, str) else source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: is not UTF-8; save the file in that encoding") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(loader, node)
        return loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"line {line}: has the character U+{error.character:04X}, which YAML does not take; "
            "delete it, or write it as an escape in double quotes"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_told(error)) from None
    except RecursionError:
        raise ConfigError(_too_deep(1)) from None


def _told(error: yaml.MarkedYAMLError) -> str:
    """Return in one sentence what PyYAML tells in several lines."""
    mark = error.problem_mark or error.context_mark
    problem = shown(error.problem or error.context or "", quoted=False)
    remedy = "write `key: value` lines, and texts with other marks in quotes"
    if "'\\t'" in problem:
        remedy = "indent with spaces, not with tabs"
    elif "single document" in str(error.context):
        problem, remedy = "a second document begins", "leave one of them"
    line = 1 if mark is None else mark.line + 1
    return f"line {line}: cannot be read as YAML: {problem}; {remedy}"


def _too_deep(line: int) -> str:
    return f"line {line}: lists and pairs are nested too deeply; write `key: value` lines"


def _check(loader: _Loader, root: yaml.Node) -> None:
    """Refuse what a configuration has no use for, before values are made of it.

    Raises:
        ConfigError: a key stands twice, which YAML would take the last of; a tag asks for another
            value than is written; or aliases are multiplied without end.
    """
    left, count = [(root, 1)], 0
    while left:
        node, depth = left.pop()
        line, count = node.start_mark.line + 1, count + 1
        if depth > _DEEPEST:
            raise ConfigError(_too_deep(line))
        if count > _MOST_VALUES:
            raise ConfigError(
                f"line {line}: there are more than {_MOST_VALUES} values up to here, those behind "
                "aliases counted each time; leave some out"
            )
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        left += [(child, depth + 1) for child in reversed(children)]
        _check_tag(loader, node)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag not in (_TAG + "str", _TAG + "merge"):
            what = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or pairs"
            raise ConfigError(f"line {line}: a key must be text, got {what}; write it in quotes")
        if key.value in lines:
            raise ConfigError(
                f"line {line}: {named(key.value)} is given twice, first in line "
                f"{lines[key.value]}; leave one out"
            )
        lines[key.value] = line


def _check_tag(loader: _Loader, node: yaml.Node) -> None:
    """Hold tags to what would be read without them, but for !!str."""
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        usual = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if len(node.value) > _LONGEST_NUMBER and node.tag in (_TAG + "int", _TAG + "float"):
            raise ConfigError(
                f"line {line}: a number of {len(node.value)} characters; write a shorter one"
            )
        fits = node.tag in (usual, _TAG + "str")
    else:
        fits = node.tag == _TAG + ("map" if isinstance(node, yaml.MappingNode) else "seq")
    if not fits:
        tag = shown(node.tag.replace(_TAG, "!!"), quoted=False)
        raise ConfigError(f"line {line}: the tag {tag} is not taken; leave it out")
