"""Imports run one way, method files need torch and the core only, and `import notebook_kit` is light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import notebook_kit

ROOT = Path(notebook_kit.__file__).parent
CORE = {"hyperparameters", "catalog", "claims", "weights", "checkpoints", "routing"}
BEDS = {"data", "models", "zoo", "training"}
METHODS = {"adapters", "routers", "mixtures", "merging", "alignment", "expert_merging", "compression", "serving"}
LAYER = {
    **dict.fromkeys(CORE, 0),
    **dict.fromkeys(BEDS, 1),
    **dict.fromkeys(METHODS, 2),
    "diagnostics": 3,
    "figures": 4,
    "widgets": 5,
    "jupyter": 6,
}
ALLOWED = {
    "mixtures": {"routers", "adapters"},
    "expert_merging": {"alignment", "merging"},
    "serving": {"compression"},
}
# A checkpoint of a method's own class can only be built by that class; imported when the bed is asked for.
LATE = {("zoo/diffusion.py", "mixtures")}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Dotted names imported by a file: when it is imported, or also later, inside its functions."""
    tree = ast.parse(path.read_text("utf-8"))
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT.parent).parts[: -node.level]
                base = ".".join([*parts, *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(tree)
    return found


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("notebook_kit.")}


def test_each_file_stands_in_a_room():
    assert len(FILES) > 40
    assert {room(path) for path in FILES} - {"__init__"} <= set(LAYER)


def test_imports_run_one_way():
    wrong = []
    for path in FILES:
        here = room(path)
        if here == "__init__":
            continue
        name = path.relative_to(ROOT).as_posix()
        at_import = rooms_of(imports(path, everywhere=False))
        for there in rooms_of(imports(path, everywhere=True)) & set(LAYER):
            late = (name, there) in LATE and there not in at_import
            if LAYER[there] > LAYER[here] and not late:
                wrong.append(f"{path.relative_to(ROOT)} imports {there}")
    assert not wrong


def test_method_rooms_stand_apart():
    wrong = []
    for path in FILES:
        here = room(path)
        if here in METHODS:
            others = (rooms_of(imports(path, everywhere=True)) & METHODS) - {here} - ALLOWED.get(here, set())
            wrong += [f"{path.relative_to(ROOT)} imports {there}" for there in others]
    assert not wrong


@pytest.mark.parametrize("library", ["plotly", "ipywidgets", "anywidget", "pandas", "matplotlib", "peft", "mergekit"])
def test_method_files_need_no(library):
    wrong = [
        str(path.relative_to(ROOT))
        for path in FILES
        if room(path) in METHODS | CORE
        for name in imports(path, everywhere=False)
        if name.split(".")[0] == library
    ]
    assert not wrong


def test_no_file_needs_a_peer():
    peers = {"mergekit", "fusion_bench", "peft"}
    assert not [path for path in FILES if {n.split(".")[0] for n in imports(path, everywhere=True)} & peers]


def test_no_annotations_as_text():
    """`from __future__ import annotations` would hide shapes and ranges from their checkers."""
    assert not [path for path in FILES if "__future__.annotations" in imports(path, everywhere=False)]


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_kit_is_light():
    code = "import json, sys; import notebook_kit; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in json.loads(fresh(code))}
    assert not loaded & {"torch", "transformers", "plotly", "pandas", "numpy", "ipywidgets", "matplotlib", "scipy"}


def test_public_names_are_there():
    for name in notebook_kit.__all__:
        assert getattr(notebook_kit, name) is not None
        assert name in dir(notebook_kit)
    with pytest.raises(AttributeError, match="module 'notebook_kit' has no attribute 'nothing'"):
        notebook_kit.nothing  # noqa: B018
    for package in ("merging", "widgets", "routers", "adapters", "alignment", "expert_merging", "mixtures"):
        module = __import__(f"notebook_kit.{package}", fromlist=["x"])
        assert all(hasattr(module, name) for name in module.__all__), package
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        notebook_kit.widgets.nothing  # noqa: B018
