"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parallel", "pangu", "recsys", "data_tools")
ALLOWED = {"parallel": set(), "pangu": {"parallel"}, "recsys": {"parallel"}, "data_tools": {"parallel"}}
LONGEST_FILE = 520
MOST_MODULES = 16  # of a folder that is no registry
REGISTRIES = {"pangu/tasks", "recsys/data/readers", "recsys/models", "data_tools/readers", "data_tools/rules"}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = path.relative_to(ROOT).parts[0]
    foreign = imported_packages(tree) - {package} - ALLOWED[package]
    assert not foreign, f"imports flow one way; {package} may not import {foreign}"
    assert ast.get_docstring(tree), "a module says what it holds"
    assert text.count("\n") <= LONGEST_FILE, "a file this long is two files"
    assert "pickle" not in imported_modules(tree), "no pickle"


def imported_modules(tree: ast.AST) -> set[str]:
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_public_classes_and_functions_have_docstrings():
    bare = []
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare


def test_top_level_is_what_the_user_fixed():
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in listed.split("\n") if name}
    assert top <= {"setup.py", *PACKAGES, "configs", "tests", "scripts", "README.md", "docs", ".ci", "pyproject.toml",
                   ".gitignore", "LICENSE", ".clang-format"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports(name: str) -> set[str]:
    """Modules of this project that a module imports anywhere: at the top, within functions, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {item if item in MODULES else node.module for item in inner}
    return (found & set(MODULES)) - {name}


@functools.cache
def arrows() -> dict[str, set[str]]:
    """What every module imports; not at the top, where each process that collects tests would read all sources."""
    return {name: imports(name) for name in MODULES}


def reached(start: str) -> set[str]:
    """Everything that can be reached from `start` by one arrow or more."""
    found: set[str] = set()
    waiting = list(arrows()[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += arrows()[name]
    return found


def test_no_circle_between_files():
    assert not sorted(name for name in MODULES if name in reached(name))


def test_no_crowded_folder():
    crowded = {}
    for path in SOURCES:
        folder = str(path.parent.relative_to(ROOT))
        if path.name != "__init__.py" and folder not in REGISTRIES:
            crowded.setdefault(folder, []).append(path.name)
    assert not {folder: len(names) for folder, names in crowded.items() if len(names) > MOST_MODULES}


# Rooms from the foundation up: a room imports those before it and itself. Arrows that point up have a reason.
FLOORS = {
    "parallel": ["common", "sharding", "kernels", "layers", "checkpoint", "training", "task", "planning", "proof"],
    "data_tools": ["records", "readers", "rules", "documents", "engines", "parts", "dedup", "classifier", "steps",
                   "synthetic", "settings", "pipeline"],
}
REASONS = {
    ("planning", "proof"): "`plan` confirms its best layouts by compiling them",
    ("checkpoint", "task"): "`reshard` builds the network whose parameters it shards",
    ("training", "task"): "a verb of training builds the task that it trains",
    ("layers", "checkpoint"): "quantized layers are read out of checkpoints",
    ("classifier", "settings"): "a verb is given the settings of the whole pipeline",
    ("classifier", "steps"): "a classifier is trained on the features of the filter that uses it",
}


def test_the_foundation_imports_nothing_of_ours():
    for name in MODULES:
        if name.startswith("parallel.common"):
            assert all(other.startswith("parallel.common") for other in arrows()[name]), name
            assert "mindspore" not in {item.split(".")[0] for item in all_imports(name)}, name


def all_imports(name: str) -> set[str]:
    """Every module that a module imports, ours or not."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_arrows_point_down():
    up = set()
    for name, others in arrows().items():
        for other in others:
            package, own, *_ = f"{name}..".split(".")
            its_package, theirs, *_ = f"{other}..".split(".")
            floors = FLOORS.get(package, [])
            if package == its_package and {own, theirs} <= set(floors) and floors.index(theirs) > floors.index(own):
                up.add((own, theirs))
    assert up == set(REASONS), "an arrow up needs a reason, and a reason an arrow"


def test_structured_text_comes_in_by_one_door():
    """`json.loads` and PyYAML know no bounds: `parallel.common.structured` reads for all."""
    door = {"parallel/common/structured.py", "parallel/common/json_text.py", "parallel/common/yaml_core.py",
            "parallel/common/ownership.py"}
    others = [f"{path.relative_to(ROOT)}:{node.lineno}" for path in SOURCES
              if str(path.relative_to(ROOT)) not in door
              for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
              if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
              and (node.value.id, node.attr) in {("json", "loads"), ("json", "load"), ("yaml", "safe_load"),
                                                 ("yaml", "load")}]
    assert not others


ASKED = {"settings", "run_settings", "package", "module", "backend", "source"}


def test_what_is_asked_of_a_model_a_backend_or_a_run_is_declared():
    """Base classes with defaults (`ModelPackage`, `Backend`, `DataSource`, `RunSettings`) in place of `hasattr`; flags
    that a verb reads are flags that it declares."""
    asked = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg) and node.arg in ASKED and ast.unparse(node.annotation or node) == "Any":
                asked.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.arg}: Any")
            elif isinstance(node, ast.Call) and node.args:
                call, whose = ast.unparse(node.func), ast.unparse(node.args[0]).rpartition(".")[2]
                if whose in ASKED | {"arguments"} and (call == "hasattr" or call == "getattr" and len(node.args) == 3):
                    asked.append(f"{path.relative_to(ROOT)}:{node.lineno} {call}({whose})")
    assert not asked


def names_in(path: Path) -> set[str]:
    """Everything that a module defines, assigns or imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
    return found


def test_what_is_imported_within_functions_is_there():
    """Collecting the tests does not run such imports, nor those of the scripts."""
    known, wrong = {name: names_in(path) for name, path in MODULES.items()}, []
    for path in [*SOURCES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                missing = [alias.name for alias in node.names if alias.name not in known.get(node.module, ())
                           and f"{node.module}.{alias.name}" not in MODULES]
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno} {node.module}.{name}" for name in missing]
    assert not wrong
