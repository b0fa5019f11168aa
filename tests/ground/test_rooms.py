"""The rooms of the package and what each may import, read from the sources: one direction, no exceptions."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "specserve"
BELOW_COMPUTE = {"ground", "kernels", "drafters", "model", "adapters", "grammar", "schedule"}
# Files of specserve/ itself are the ground. docs/architecture.md draws this; a room is in no other's way than here.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "ground": set(),
    "drafters": {"ground", "kernels"},
    "model": {"ground"},
    "text": {"ground"},
    "grammar": {"ground"},
    "chat": {"ground", "text", "grammar"},
    "adapters": {"ground", "kernels", "drafters", "model"},
    "schedule": {"ground", "grammar"},
    "drafting": BELOW_COMPUTE,
    "compute": BELOW_COMPUTE,
    "engine": BELOW_COMPUTE | {"text", "drafting", "compute"},
    "training": BELOW_COMPUTE | {"text", "chat", "drafting", "compute", "engine"},
    "server": {"ground", "model", "text", "grammar", "chat"},
    "llm": {"ground", "model", "text", "chat", "server"},
    "loadgen": {"ground"},
    "ray": {"ground", "model", "server"},
    "teachers": {"ground", "model", "text", "chat", "adapters", "llm"},
    "curation": {"ground", "text", "chat", "grammar", "model", "adapters", "llm", "teachers", "training"},
    "leaderboard": {"ground", "model", "text", "adapters", "teachers", "training"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
# compute/ knows the three paths; they do not know each other.
PATHS = ("compute.torch", "compute.native", "compute.cuda")
# What makes rows needs their formats and how good answers are, not how a run goes.
OF_TRAINING = {"curation": ("data.", "evaluation.task_metrics", "pooling.metrics", "pooling.questions", "pooling.rows")}
WITHOUT_TORCH = (
    "ground",
    "text",
    "chat",
    "grammar",
    "schedule",
    "server",
    "llm",
    "ray",
    "loadgen",
    "teachers",
    "curation",
    "leaderboard",
)


def room_of(module: str) -> str:
    """`specserve.compute.cuda.lora` -> compute, and so is `specserve.compute` itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in MAY_IMPORT else "ground"


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its name; pathlib does not follow the linked folders."""
    for root in (PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_symlink())):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imports_of(module: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of each import, wherever in the file, those for type checking and within functions included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in known else source


@pytest.fixture(scope="module")
def graph() -> dict[str, list[tuple[int, str]]]:
    files = dict(sources())
    return {module: list(imports_of(module, path, set(files))) for module, path in files.items()}


def test_every_room_is_known(graph):
    assert {room_of(module) for module in graph} == set(MAY_IMPORT)


def test_imports_go_one_way(graph):
    """The package itself names the Python API for type checkers, and finds it on first use."""
    wrong = [
        f"{module}:{line} ({room_of(module)}) imports {target} ({room_of(target)})"
        for module, imports in graph.items()
        for line, target in imports
        if target.split(".")[0] == "specserve"
        and room_of(target) not in {room_of(module), *MAY_IMPORT[room_of(module)]}
        and not (module == "specserve" and room_of(target) == "llm")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_compute_paths_do_not_know_each_other(graph):
    def path_of(module: str) -> str | None:
        return next((path for path in PATHS if module.startswith(f"specserve.{path}.")), None)

    wrong = [
        f"{module}:{line} imports {target}"
        for module, imports in graph.items()
        for line, target in imports
        if path_of(module) and path_of(target) not in (None, path_of(module))
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_outside_compute_knows_a_path(graph):
    wrong = [
        f"{module}:{line} imports {target}"
        for module, imports in graph.items()
        if room_of(module) != "compute"
        for line, target in imports
        if target.startswith(tuple(f"specserve.{path}" for path in PATHS))
    ]
    assert not wrong, "\n".join(wrong)


def test_who_needs_rows_knows_nothing_of_runs(graph):
    wrong = [
        f"{module}:{line} imports {target}"
        for module, imports in graph.items()
        for line, target in imports
        if (parts := OF_TRAINING.get(room_of(module))) is not None
        and room_of(target) == "training"
        and not target.startswith(tuple(f"specserve.training.{part}" for part in parts))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_rooms_that_are_free_of_torch(graph, room):
    """Of triton and peft, too; directly, since what they may import is free of it or imports it late."""
    wrong = [
        f"{module}:{line} imports {target}"
        for module, imports in graph.items()
        if room_of(module) == room
        for line, target in imports
        if target.split(".")[0] in ("torch", "triton", "peft")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by these, and refuses a second one of a name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, num in names.items() if num > 1]
