"""Private names: pysteer declares every private name of llama_cpp that it uses."""

import ast
from collections.abc import Iterator
from pathlib import Path

import llama_cpp

import pysteer
from pysteer.llama.hooked import HookedLlama
from pysteer.llama.versions import PRIVATE_NAMES

PACKAGE = Path(pysteer.__file__).parent
LLAMA_CPP = Path(llama_cpp.__file__).parent
# Public in spite of the underscore: of ctypes and of named tuples.
DOCUMENTED = {"_fields_", "_handle", "_name", "_asdict", "_fields", "_replace", "_make"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """Private attributes of objects other than `self`, and inherited ones of `self`."""
    defined = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
    }
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = [node for node in names if isinstance(node.value, ast.Name) and node.value.id == "self"]
    defined |= {node.attr for node in own if isinstance(node.ctx, ast.Store)}
    defined |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in names:
        if private(node.attr) and (node not in own or node.attr not in defined):
            yield node.attr
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama_cpp"):
            yield from filter(private, [*node.module.split("."), *(a.name for a in node.names)])


def defined_names(folder: Path) -> set[str]:
    """All private attributes and functions of a folder's modules, and its private modules."""
    found: set[str] = set()
    for path in folder.glob("*.py"):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
    return set(filter(private, found))


def test_private_names_of_llama_cpp_are_those_declared():
    # Of a name that some versions lack, HookedLlama has a value of its own.
    theirs = defined_names(LLAMA_CPP) | (set(PRIVATE_NAMES) & set(vars(HookedLlama)))
    assert set(PRIVATE_NAMES) <= theirs
    used = {
        name: str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for name in foreign_names(ast.parse(path.read_text()))
        if name in theirs
    }
    assert set(used) == set(PRIVATE_NAMES), used


def test_runtime_engine_and_llama_use_no_private_name_of_another_object():
    used = {
        (str(path.relative_to(PACKAGE)), name)
        for folder in ("llama", "runtime", "engine")
        for path in (PACKAGE / folder).rglob("*.py")
        for name in foreign_names(ast.parse(path.read_text()))
    }
    assert {name for _, name in used} <= set(PRIVATE_NAMES), used
