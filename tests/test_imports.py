"""A module imports only modules above it in this list."""

import ast
from pathlib import Path

import tgate_processors


ORDER = [
    "errors",
    "interruption",
    "plotting",
    "schedule",
    "presets",
    "watch",
    "gate",
    "layers",
    "processors",
    "installation",
    "guidance",
    "interception",
    "deepcache",
    "cost",
    "network",
    "pipelines",
    "summary",
    "handle",
    "convergence",
    "loaders",
    "ways",
    "likeness",
    "quality_report",
    "quality",
    "sheet",
    "processes",
    "generate",
    "architectures",
    "run_cost",
    "rig",
    "contestants",
    "bench",
    "__init__",
    "demo",
    "commands",
    "cli",
    "__main__",
]
PACKAGE = Path(tgate_processors.__file__).parent


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tgate_processors":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]


def test_imports_run_in_one_direction():
    for path in PACKAGE.rglob("*.py"):
        module = module_of(path)
        allowed = [*ORDER[: ORDER.index(module)], *(["demo"] if module == "demo" else [])]
        public = [*tgate_processors.__all__, "__version__"] if "__init__" in allowed else []
        wrong = [name for name in imports(path) if name not in allowed and name not in public]
        assert not wrong, f"{path.name} imports {wrong}"


def test_the_front_door_is_sorted():
    assert tgate_processors.__all__ == sorted(tgate_processors.__all__)
    assert all(hasattr(tgate_processors, name) for name in tgate_processors.__all__)
