"""A module imports only modules above it in this list."""

import ast
from pathlib import Path

import tgate_processors


ORDER = [
    "errors",
    "_validation",
    "_tables",
    "_modes",
    "schedule",
    "_families",
    "presets",
    "_clock",
    "_watch",
    "_folding",
    "_gated_layers",
    "_kept",
    "_guidance",
    "_record",
    "_store",
    "_run_state",
    "_part",
    "run",
    "gate",
    "_layers",
    "_disguise",
    "processors",
    "_installation",
    "_interception",
    "_checkpointing",
    "_callers",
    "_network",
    "_deepcache",
    "_caches",
    "_pipelines",
    "_advice",
    "_loop",
    "_copying",
    "_cost",
    "summary",
    "handle",
    "loaders",
    "measure",
    "measure.plotting",
    "measure.sheet",
    "measure.interruption",
    "measure.convergence",
    "__init__",
    "measure.ways",
    "measure.samplers",
    "measure.likeness",
    "measure.intervals",
    "measure.quality_report",
    "measure.quality_plot",
    "measure.quality",
    "measure.pair",
    "measure.tune",
    "measure.architectures",
    "measure.run_cost",
    "measure.published",
    "measure.rig",
    "measure.contestants",
    "measure.bench",
    "demo",
    "cli.outputs",
    "cli.processes",
    "cli.generate",
    "cli.explore",
    "cli.inputs",
    "cli.commands",
    "cli.options",
    "cli.running",
    "cli",
    "__main__",
]
PACKAGE = Path(tgate_processors.__file__).parent
FOLDERS = ("measure", "cli")  # the demo's own order is not looked at


def name_of(parts):
    """Of a module in `ORDER`, from the parts of its dotted name below the package."""
    if not parts:
        return "__init__"
    return ".".join(parts[:2]) if parts[0] in FOLDERS and len(parts) > 1 else parts[0]


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return name_of(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path):
    """The modules of this package that a module imports, or imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tgate_processors":
            parts = node.module.split(".")[1:]
            for alias in node.names:
                module = name_of([*parts, alias.name])
                yield module if module in ORDER else name_of(parts)


def test_imports_run_in_one_direction():
    for path in PACKAGE.rglob("*.py"):
        module = module_of(path)
        allowed = [*ORDER[: ORDER.index(module)], *(["demo"] if module == "demo" else [])]
        wrong = [name for name in imports(path) if name not in allowed]
        assert not wrong, f"{path.name} imports {wrong}"


def test_every_module_has_its_place():
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} == set(ORDER)


def test_the_front_door_is_sorted():
    assert tgate_processors.__all__ == sorted(tgate_processors.__all__)
    assert all(hasattr(tgate_processors, name) for name in tgate_processors.__all__)
