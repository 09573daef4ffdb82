"""YAML as plain values: numbers as people write them, no objects, nothing that expands without end."""

from __future__ import annotations

import copy
import errno
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from metahpo.errors import one_line, shown

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
DEEPEST = 50
_CORE = "tag:yaml.org,2002:"
_SCALARS = {_CORE + kind for kind in ("str", "int", "float", "bool", "null", "merge")}
_INT = re.compile(r"^[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)


def read(path: Path) -> Any:
    """The plain values that a YAML file holds.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: it is not YAML, or too large; one line that does not name the file.
    """
    try:
        kind = path.stat()
    except ValueError as error:  # A name that no file can have.
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(kind.st_mode) and not stat.S_ISDIR(kind.st_mode):
        # To read a pipe or a device may wait, or go on, for ever.
        raise OSError(errno.EINVAL, "Not a regular file")
    if kind.st_size > MOST_BYTES:
        raise ValueError(f"is too large: {kind.st_size:,} bytes, expected at most {MOST_BYTES:,}")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError("is not text") from None
    except ValueError as error:
        raise ValueError(f"is not YAML: {error}") from None


def parse(text: str) -> Any:
    """The text as plain values: dicts, lists, text, numbers, true, false and null.

    Numbers are those of YAML 1.2, so that ``010`` is ten and ``1:30`` is text, and ``1e-3`` is one
    too. Values that an alias repeats are copies, so that a change of one leaves the others alone.

    Raises:
        ValueError: the text is not YAML, has other tags than those of plain values, repeats a key,
            or expands without end; the reason in one line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node)
            return _apart(loader.construct_document(node))
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(one_line(_reason(error))) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(one_line(error)) from None


def _reason(error: yaml.MarkedYAMLError) -> str:
    """What is wrong, and where."""
    said = " ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    return f"{said} (line {mark.line + 1}, column {mark.column + 1})" if mark else said


def _refusal(said: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=said, problem_mark=node.start_mark)


def dump(tree: Any) -> str:
    """The plain values as YAML, which ``parse`` reads as the same; keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _measure(node: yaml.Node) -> None:
    """Raises YAMLError unless the document is a tree of plain values of bounded size and depth."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        key = id(node)
        if key in open_nodes:
            raise _refusal("an alias lies within what it repeats", node)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels")
        if not _plain(node):
            tag = node.tag.replace(_CORE, "!!")
            raise _refusal(f"tag {shown(tag)} makes no plain value", node)
        if key not in sizes:
            open_nodes.add(key)
            sizes[key] = 1 + sum(size(child, depth + 1) for child in _children(node))
            open_nodes.remove(key)
            if sizes[key] > MOST_VALUES:
                raise yaml.YAMLError(f"its aliases expand to more than {MOST_VALUES:,} values")
        return sizes[key]

    size(node, 0)


def _plain(node: yaml.Node) -> bool:
    if isinstance(node, yaml.MappingNode):
        return node.tag == _CORE + "map"
    return node.tag == _CORE + "seq" if isinstance(node, yaml.SequenceNode) else node.tag in _SCALARS


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _apart(value: Any) -> Any:
    """The same values without any that are one object in two places."""
    if isinstance(value, dict):
        return {key: _apart(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_apart(child) for child in value]
    return value


class _Loader(yaml.SafeLoader):
    """Plain values alone; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != _CORE + "merge":
                    raise _refusal(f"key {shown(key.value)} is given twice", node)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if not _INT.match(text):
            raise _refusal(f"{shown(text)} is not a whole number", node)
        digits = text.replace("_", "")
        prefixed = digits.lstrip("+-")[:2] in ("0b", "0o", "0x")
        return int(digits, 0 if prefixed else 10)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node))
        if not _FLOAT.match(text) and not _INT.match(text):
            raise _refusal(f"{shown(text)} is not a number", node)
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            return float(text.replace(".", ""))
        number = float(text.replace("_", ""))
        if math.isinf(number):
            raise _refusal(f"{shown(text)} is too large a number", node)
        return number

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        text = str(self.construct_scalar(node))
        if text.lower() not in self.bool_values:
            raise _refusal(f"{shown(text)} is not true or false", node)
        return self.bool_values[text.lower()]

    def construct_null(self, node: yaml.ScalarNode) -> None:
        text = str(self.construct_scalar(node))
        if text.lower() not in ("", "~", "null"):
            raise _refusal(f"{shown(text)} is not null", node)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that ``_Loader`` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in ("int", "float", "bool", "null"):
    _Loader.add_constructor(_CORE + _kind, getattr(_Loader, f"construct_{_kind}"))
# Without a run directory named 2024-05-17 as a date, "=" as a value of its own, and YAML 1.1's
# numbers.
_REPLACED = {_CORE + kind for kind in ("int", "float", "timestamp", "value")}
_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _REPLACED]
    for first, found in _Loader.yaml_implicit_resolvers.items()
}
for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = copy.deepcopy(_resolvers)
    _yaml.add_implicit_resolver(_CORE + "int", _INT, list("-+0123456789"))
    _yaml.add_implicit_resolver(_CORE + "float", _FLOAT, list("-+.0123456789"))
