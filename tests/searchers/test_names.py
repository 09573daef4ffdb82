"""What metahpo.searchers hands out when it is asked for, against what type checkers are told."""

from __future__ import annotations

import ast
from pathlib import Path

import metahpo.searchers
from metahpo.searchers import _HOMES

FOLDER = Path(metahpo.searchers.__file__).parent


def bound(path: Path) -> set[str]:
    """The names of classes and functions that a module makes or imports at its top."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def test_type_checkers_see_the_names_that_are_there():
    block = next(
        node
        for node in ast.parse((FOLDER / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        package, _, home = node.module.rpartition(".")
        assert package == "metahpo.searchers"
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: `as {alias.name}` says that it is handed on"
            seen[alias.name] = home
    assert seen == _HOMES


def test_every_name_is_in_its_home():
    for home in set(_HOMES.values()):
        module = FOLDER / home / "__init__.py" if (FOLDER / home).is_dir() else FOLDER / f"{home}.py"
        assert {name for name, its in _HOMES.items() if its == home} <= bound(module), home
