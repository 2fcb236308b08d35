"""Imports point one way, and figures need no torch."""

import ast
import subprocess
import sys

import pytest
from tiny import ROOT

PACKAGE = ROOT / "piebridge"

# From the bottom up: a module imports from the layers below its own, never from its own or from above.
LAYERS = [
    {"config", "costs", "records", "embedded", "routing", "crops", "checkpoints", "updates", "folding"},
    {"data", "backbones", "engines", "figures", "collection", "goal", "tensor_selection", "progress"},
    {"cutting", "pet", "alignment", "channel_pruning", "cloud_figures"},
    {"subnets"},
    {"router", "latents"},
    {"cloud", "training"},
    {"methods.setting", "transfer"},
    {"methods.*"},
    {"methods"},
    {"experiment"},
    {"audit"},
    {"__main__"},
]
ANYWHERE = {"__init__"}  # the package's own file: version and docstring


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(name):
    for level, layer in enumerate(LAYERS):
        if name in layer:
            return level
    if name.startswith("methods."):
        return next(level for level, layer in enumerate(LAYERS) if "methods.*" in layer)
    raise AssertionError(f"{name} has no place in the layers")


def imported_names(path):
    """Absolute dotted names of everything that a file imports, also inside functions."""
    package = ["piebridge", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path):
    """Modules of the package that a file imports."""
    found = set()
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "piebridge":
            known = [end for end in range(len(parts), 1, -1) if ".".join(parts[1:end]) in MODULES]
            if known:
                found.add(".".join(parts[1 : known[0]]))
    return found - {module_name(path)}


def test_the_reader_of_imports_sees_them():
    assert {"config", "embedded"} <= imported_modules(PACKAGE / "data.py")
    assert {"methods.setting", "methods.pet", "training"} <= imported_modules(PACKAGE / "methods" / "__init__.py")
    assert "engines" in imported_modules(PACKAGE / "subnets.py")  # inside a function


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ANYWHERE])
def test_imports_point_down(name):
    upward = {other for other in imported_modules(MODULES[name]) if layer_of(other) >= layer_of(name)}
    assert not upward


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_notebooks_or_tests(name):
    assert not {imported.split(".")[0] for imported in imported_names(MODULES[name])} & {"notebooks", "tests", "book"}


def test_figures_read_records_only():
    assert imported_modules(PACKAGE / "figures.py") <= {"records"}
    assert imported_modules(PACKAGE / "cloud_figures.py") == {"figures"}
    command = "import sys, piebridge.cloud_figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
