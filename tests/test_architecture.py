"""The shape of the house: what may import what, what is packaged, where settings are read."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("backends", "engine", "keeper", "producer", "schemas", "worker")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())

# May read the process environment, and why. Everybody else is handed a frozen settings object.
READ_ENVIRONMENT: dict[str, str] = {
    "engine/guided/checker.py": "hands it on to the child",
    "engine/spawn.py": "hands it on to the child, and says how its threads wait",
    "schemas/home.py": "the XDG base directory rule, without pydantic-settings",
}

# Import time is what a user of the client waits for, and torch is what the client must not need.
HEAVY = {"torch", "transformers", "numpy", "boto3", "gristmill.worker", "gristmill.engine"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(code: str) -> set[str]:
    """What ``code`` leaves in sys.modules of a fresh interpreter."""
    probe = f"{code}\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def environment_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read os.environ or os.getenv, however they were imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for a in node.names if a.name in {"environ", "getenv", "environb"})


def test_every_directory_with_an_init_is_a_listed_package() -> None:
    found = {
        ".".join(("gristmill", *path.parent.relative_to(ROOT).parts))
        for path in MODULES
        if path.name == "__init__.py"
    }
    assert found == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_every_directory_with_modules_is_a_package() -> None:
    bare = {name_of(path.parent) for path in MODULES if not (path.parent / "__init__.py").exists()}
    assert not bare


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_says_it_is_typed(name: str) -> None:
    assert (ROOT / name / "py.typed").is_file()
    assert "py.typed" in SETTINGS["tool"]["setuptools"]["package-data"][f"gristmill.{name}"]


def test_gristmill_itself_is_a_namespace_without_code() -> None:
    spec = importlib.util.find_spec("gristmill")
    assert spec is not None
    assert spec.origin is None


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "shared"}
    assert not [name_of(path) for path in MODULES if {path.stem, path.parent.name} & drawers]


def test_only_settings_read_the_environment() -> None:
    readers = {
        f"{name_of(path)}:{line}"
        for path in MODULES
        if path.name != "settings.py" and name_of(path) not in READ_ENVIRONMENT
        for line in environment_reads(ast.parse(path.read_text()))
    }
    assert not readers


def test_the_list_of_environment_readers_is_not_stale() -> None:
    idle = [
        name
        for name in READ_ENVIRONMENT
        if not (ROOT / name).is_file() or not [*environment_reads(ast.parse((ROOT / name).read_text()))]
    ]
    assert not idle


def test_console_scripts_point_at_functions_that_exist() -> None:
    scripts = {entry.name: entry for entry in distribution("gristmill").entry_points}
    assert {"gristmill", "gristmill-keeper", "gristmill-worker"} <= set(scripts)
    for entry in scripts.values():
        assert callable(entry.load()), entry.value


def test_importing_the_client_loads_neither_torch_nor_engine_nor_worker() -> None:
    loaded = imported_modules("import gristmill.producer, gristmill.producer.cli")
    assert not loaded & HEAVY


def test_importing_the_keeper_loads_neither_torch_nor_engine_nor_worker() -> None:
    loaded = imported_modules("import gristmill.keeper.cli, gristmill.keeper.keeper")
    assert not loaded & HEAVY


def test_importing_the_engine_loads_no_client_of_any_service() -> None:
    engine = [
        path.relative_to(ROOT).with_suffix("") for path in MODULES if path.is_relative_to(ROOT / "engine")
    ]
    names = [".".join(("gristmill", *path.parts)).removesuffix(".__init__") for path in engine]
    loaded = imported_modules(f"import {', '.join(names)}")
    assert not loaded & {"redis", "kombu", "celery", "boto3", "huggingface_hub", "transformers"}


def test_starting_the_engine_loads_no_computer_algebra() -> None:
    """torch.testing.assert_close brings sympy along by way of torch.distributed: a second of every start."""
    loaded = imported_modules(
        "import torch, gristmill.engine.engine; from gristmill.engine.layers.linear import packing_works; "
        "[packing_works(dtype) for dtype in (torch.float32, torch.bfloat16)]"
    )
    assert not loaded & {"sympy", "torch.distributed.tensor"}


def test_relative_imports_stay_inside_a_package_and_absolute_ones_never_name_gristmill() -> None:
    named = {
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "gristmill"
            and not node.level
        )
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "gristmill" for a in node.names))
    }
    assert not named


def test_constraints_pin_everything_that_pyproject_asks_for() -> None:
    pins = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project: dict[str, Any] = SETTINGS["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(need for extra in ("worker", "dev") for need in extras[extra])]
    assert not {bare_name(need) for need in asked} - pins


def bare_name(requirement: str) -> str:
    """``celery[redis]==5.7.*`` -> ``celery``."""
    end = next((i for i, c in enumerate(requirement) if c in "[<>=!~; "), len(requirement))
    return requirement[:end].lower().replace("_", "-")
