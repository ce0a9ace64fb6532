"""Imports go down only (core <- data <- synth, models, metrics <- stages <- cli, report), and light modules
stay light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "raysynth"
MAY_IMPORT = {
    "core": {"core"},
    "data": {"core", "data"},
    "synth": {"core", "data", "synth"},
    "models": {"core", "data", "models"},
    "metrics": {"core", "data", "metrics"},
    "stages": {"core", "data", "synth", "models", "metrics", "stages"},
    "report": {"core", "data", "synth", "models", "metrics", "stages", "report"},
    "cli": {"core", "data", "synth", "models", "metrics", "stages", "report", "cli"},
    "__main__": {"cli"},
    "__init__": set(),
}
HEAVY = {"core": {"torch", "ray"}, "data": {"torch", "ray"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere, in functions too; type-checking-only imports included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_go_down_only(file: Path) -> None:
    mine = layer(file)
    for name in imports(file):
        root, _, rest = name.partition(".")
        if root == "raysynth" and rest.split(".")[0] in MAY_IMPORT:
            assert rest.split(".")[0] in MAY_IMPORT[mine], f"{mine} imports {name}"
        assert root != "ray" or mine == "stages", f"{mine} imports ray; only stages may"
        assert root not in HEAVY.get(mine, set()), f"{mine} imports {root}"
        assert root not in ("pickle", "tests"), f"{mine} imports {root}"


def test_every_module_has_a_layer() -> None:
    assert {layer(f) for f in FILES} <= set(MAY_IMPORT)
    assert not list(PACKAGE.rglob("utils.py"))


@pytest.mark.parametrize("module", ["raysynth", "raysynth.cli", "raysynth.core.config", "raysynth.data.plans"])
def test_light_modules_load_neither_torch_nor_ray(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there")
    code = f"import sys, {module}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_modules_say_what_they_do_and_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or not text.strip()
    assert text.count("\n") <= 330, "split it"
