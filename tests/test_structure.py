"""The shape of the code: imports run one way, and files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pysteer"

# A part imports from the parts before it, and from none after it. `extract` and `runtime` stand
# side by side: each works without the other.
STREET = [
    ["distribution", "errors", "intervals", "progress", "thoughts"],
    ["category", "files", "strict_json"],
    ["journal", "judge", "prompts", "settings"],
    ["formats"],
    ["pack"],
    ["chat", "inspect", "shipped"],
    ["llama"],
    ["extract", "runtime"],
    ["engine"],
    ["evaluate"],
    ["calibrate"],
    ["cli"],
    ["__main__"],
]
FLOOR = {part: floor for floor, parts in enumerate(STREET) for part in parts}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """Dotted names of the modules of pysteer that a file imports anywhere, also in functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pysteer"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pysteer"))


def module_of(name):
    """The file of a dotted name, which may end in the name of a class or function."""
    parts = name.split(".")[1:]
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
        parts.pop()
    return None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_parts_before_its_own(path):
    if path == PACKAGE / "__init__.py":
        return  # the public names, which load when asked for
    own = part_of(path)
    for name in imports_of(path):
        target = name.split(".")[1]
        if target in ("_native", own) or module_of(name) is None:
            continue
        assert FLOOR[target] < FLOOR[own], f"{own} imports {name}"


def test_modules_import_each_other_without_a_circle():
    graph = {
        path: {module_of(name) for name in imports_of(path)} - {None, path}
        for path in MODULES
        if path.name != "__init__.py"
    }
    done, under_way = set(), []

    def visit(path):
        assert path not in under_way, [str(p.relative_to(PACKAGE)) for p in [*under_way, path]]
        if path in done:
            return
        under_way.append(path)
        for target in graph.get(path, ()):
            visit(target)
        under_way.pop()
        done.add(path)

    for path in graph:
        visit(path)


@pytest.mark.parametrize("folder", ["pysteer", "csrc"])
def test_files_have_at_most_500_lines(folder):
    kinds = ("py", "pyi", "cpp", "hpp")
    files = [path for kind in kinds for path in (ROOT / folder).rglob(f"*.{kind}")]
    assert files
    assert not [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 500]


def functions():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_functions_have_at_most_80_lines():
    assert not [name for name, node in functions() if node.end_lineno - node.lineno + 1 > 80]


def test_functions_have_at_most_10_parameters():
    found = []
    for name, node in functions():
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if len([one for one in every if one.arg not in ("self", "cls")]) > 10:
            found.append(name)
    assert not found
