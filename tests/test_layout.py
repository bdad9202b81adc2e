"""Who may include and import whom, read from the sources."""

import ast
import functools
import graphlib
import importlib
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "python" / "dither"

# C++ and CUDA

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})
FAMILIES = sorted(d.name for d in CSRC.iterdir() if d.is_dir() and d.name != "common")
INTRINSICS = {"immintrin.h", "arm_neon.h"}


@functools.cache
def includes(path: pathlib.Path) -> tuple[frozenset[str], frozenset[pathlib.Path]]:
    """The headers of others and the files of this project that a file includes, directly or not."""
    others: set[str] = set()
    ours: set[pathlib.Path] = set()
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])(.+?)[">]', path.read_text(), flags=re.M):
        target = (path.parent / name).resolve()
        if bracket == "<" or not target.is_file():
            others.add(name)
        else:
            further = includes(target)
            others |= further[0]
            ours |= {target, *further[1]}
    return frozenset(others), frozenset(ours)


def test_the_rules_see_the_sources():
    others, ours = includes(CSRC / "noise" / "draw.isa.cpp")
    assert "cstdint" in others and CSRC / "common" / "scalar.h" in ours
    assert any("torch/csrc/stable" in name for name in includes(CSRC / "noise" / "draw.cpp")[0])
    assert "noise" in FAMILIES


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes(path):
    others, ours = includes(path)
    if path != CSRC / "common" / "torch.h" and (path.suffix != ".cpp" or path.name.endswith(".isa.cpp")):
        assert not {name for name in others if re.match("torch|ATen|c10|pybind11|Python", name)}, "kernels never see torch"
    if path.name.endswith(".isa.cpp"):
        assert others <= {"cstdint"} | INTRINSICS, "inline functions of the library would be emitted for one instruction set"
    if path.parent != CSRC:
        strangers = {p for p in ours if p.relative_to(CSRC).parts[0] not in (path.relative_to(CSRC).parts[0], "common")}
        assert not strangers, "a family sees itself and common; common sees only itself"


# Python. A part of the package is a module or subpackage of dither; its edges are the parts that it may import.

EVERYTHING = None
EDGES: dict[str, set[str] | None] = {
    "_checks": set(),
    "_extras": set(),
    "reference": set(),
    "ops": {"reference"},
    "noise": {"ops"},
    "optim": {"ops", "noise"},
    "sparsity": {"ops", "noise", "optim", "_checks", "_extras"},
    "privacy": {"ops", "noise", "optim", "_checks", "_extras"},
    "tokens": {"ops", "noise", "_checks", "_extras"},
    "transport": {"ops", "noise", "_checks", "_extras"},
    "sampling": {"ops", "noise", "tokens", "_checks", "_extras"},
    "train": {"ops", "noise", "optim", "sparsity", "privacy", "tokens", "transport", "sampling", "_checks", "_extras"},
    "bench": EVERYTHING,
    "cli": EVERYTHING,
    "demo": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}
COMPILED = "_C"  # for ops alone
THIRD_PARTY = {"torch", "numpy", "typing_extensions"}  # for the parts that have a set of edges; reference: without the last


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def nodes(tree: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    """The nodes of a module: all, or those that run when it is imported."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if deferred or not (in_function or for_types):
            yield from nodes(node, deferred)


def imports(module: str, deferred: bool = True) -> set[str]:
    """Absolute names of the modules that a module imports; of this package, the deepest that exists."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes(ast.parse(path.read_text()), deferred):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            found |= {f"{base}.{alias.name}" if base.split(".")[0] == "dither" else base for alias in node.names}
    compiled = f"dither.{COMPILED}"
    known = {*MODULES, compiled}
    return {name if name in known or not name.startswith("dither.") else name.rpartition(".")[0] for name in found}


def test_every_part_has_its_edges():
    assert {part_of(m) for m in MODULES} <= set(EDGES), "add the new part to EDGES"


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    part = part_of(module)
    names = imports(module)
    ours = {name for name in names if name.split(".")[0] == "dither"}
    if part != "ops":
        assert f"dither.{COMPILED}" not in ours, "kernels are reached through ops"
    allowed = EDGES[part]
    if allowed is not EVERYTHING:
        parts = {part_of(name) for name in ours if name not in ("dither", f"dither.{COMPILED}")}
        assert parts <= allowed | {part}
        third_party = {name.split(".")[0] for name in names - ours} - sys.stdlib_module_names
        assert third_party <= THIRD_PARTY - ({"typing_extensions"} if part == "reference" else set())


def test_imports_are_acyclic():
    graph = {m: imports(m, deferred=False) & set(MODULES) - {m, "dither"} for m in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_described(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    if module.endswith("__main__"):
        return
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("dither"):
            raise
        pytest.skip(f"{error.name} is not installed")
    names = getattr(loaded, "__all__", [])
    assert len(set(names)) == len(names) and not [name for name in names if not hasattr(loaded, name)]
