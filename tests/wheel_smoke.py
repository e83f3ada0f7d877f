"""What the built wheel must hold; run by scripts/check-wheel with the source out of reach, not by pytest.

Arguments: the site-packages it was installed in, and a file naming the packages' files as git lists them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "numpy", "gristmill.worker", "gristmill.engine")
LIGHT = (
    "gristmill.producer",
    "gristmill.producer.cli",
    "gristmill.keeper.cli",
    "gristmill.backends",
    "gristmill.schemas",
)


def main(site: Path, expected: list[str]) -> None:
    package = site / "gristmill"
    missing = [name for name in expected if not name.endswith("README.md") and not (package / name).is_file()]
    assert not missing, f"not in the wheel: {', '.join(missing)}; see [tool.setuptools] in pyproject.toml"

    modules = sorted(path for path in package.rglob("*.py") if not path.name.startswith("__"))
    for name in ("schemas", "backends", "engine", "keeper", "producer", "worker"):
        module = importlib.import_module(f"gristmill.{name}")
        assert str(module.__file__).startswith(str(package)), f"{name} came from {module.__file__}"
        assert (package / name / "py.typed").is_file(), f"{name} has no py.typed"
    for path in modules:
        importlib.import_module(".".join(("gristmill", *path.relative_to(package).with_suffix("").parts)))

    probe = f"import sys, {', '.join(LIGHT)}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    heavy = subprocess.run([sys.executable, "-P", "-c", probe], check=True, capture_output=True, text=True)
    assert not heavy.stdout.strip(), f"importing the client brings in {heavy.stdout.strip()}"

    scripts = {e.name: e for e in importlib.metadata.distribution("gristmill").entry_points}
    assert {"gristmill", "gristmill-keeper", "gristmill-worker"} <= set(scripts), (
        f"console scripts: {sorted(scripts)}"
    )
    for entry in scripts.values():
        assert callable(entry.load()), f"{entry.name} does not load"
    version = importlib.metadata.version("gristmill")
    print(f"wheel {version}: {len(expected)} files, {len(modules)} modules import, client is light")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).read_text().split())
