"""Imports point downward, and every module can be imported by its dotted path."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import tokenfuse

FLOORS = (
    ("__main__",),
    ("cli",),
    ("app", "bench", "integrations"),
    ("micro",),
    ("inference", "testing"),
    ("sessions",),
    ("compression",),
    ("config",),
    ("registry",),
    ("builtin",),
    ("hooks",),
    ("adapters",),
    ("strategies",),
    ("ops", "prompt"),
    ("plan", "report"),
    ("tokens",),
    ("pictures",),
    ("costs",),
    ("errors",),
)
"""The rooms of the package, from the roof down. A room sees those below it, none beside it."""

ROOT = Path(tokenfuse.__file__).parent
MODULES = ["tokenfuse", *(m.name for m in pkgutil.walk_packages(tokenfuse.__path__, "tokenfuse."))]
FOR_OTHERS = {
    "tokenfuse.integrations.lmms_eval",
    "tokenfuse.integrations._vllm_qwen2_5_vl",
    "tokenfuse.integrations._vllm_qwen3_vl",
}
"""Modules that only those import who have the package that they are for."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported(path):
    """Every module of tokenfuse that a file imports, at its head or in a function."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        # What only annotations need is imported by type checkers alone.
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def edges():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("tokenfuse", *parts)).removesuffix(".__init__")
        for target in imported(path):
            if target.startswith("tokenfuse.") and target != name:
                yield name, target


EDGES = sorted(set(edges()))


def room(module):
    return module.split(".")[1]


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES if "." in name} == FLOOR.keys()


def test_imports_point_downward():
    up = [
        f"{one} imports {other}"
        for one, other in EDGES
        if "." in one and room(one) != room(other) and FLOOR[room(one)] >= FLOOR[room(other)]
    ]
    assert up == []


def test_no_modules_import_each_other_in_a_circle():
    below = {name: {other for one, other in EDGES if one == name} for name in MODULES}

    def search(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        found = (search(other, [*trail, name]) for other in sorted(below.get(name, ())))
        return next((circle for circle in found if circle), None)

    # A package's own modules may be named by it, for its users.
    for name in MODULES:
        below[name] -= {name.rpartition(".")[0]}
        if (ROOT / name.partition(".")[2].replace(".", "/") / "__init__.py").exists():
            below[name] = set()
    for name in MODULES:
        circle = search(name, [])
        assert circle is None, " imports ".join(circle)


def test_strategies_know_no_model():
    for path in (ROOT / "strategies").glob("*.py"):
        assert not any(name.startswith("transformers") for name in imported(path)), path.name


def test_only_methods_and_families_stand_without_an_underscore():
    for package, base in (("strategies", "Strategy"), ("adapters", "ModelAdapter")):
        bases = importlib.import_module(f"tokenfuse.{package}")
        for path in (ROOT / package).glob("[!_]*.py"):
            module = importlib.import_module(f"tokenfuse.{package}.{path.stem}")
            own = [
                cls
                for cls in vars(module).values()
                if isinstance(cls, type)
                and cls.__module__ == module.__name__
                and issubclass(cls, getattr(bases, base))
            ]
            assert [cls.name for cls in own] == [path.stem]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FOR_OTHERS])
def test_every_module_is_what_its_dotted_path_says(name):
    module = importlib.import_module(name)
    found = tokenfuse
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert found is module


def test_a_module_can_be_the_first_that_is_imported():
    for name in (
        "tokenfuse.strategies.ttf",
        "tokenfuse.adapters.qwen3_vl",
        "tokenfuse.prompt.turn",
    ):
        subprocess.run([sys.executable, "-c", f"import {name} as found; found"], check=True)


def test_contributing_states_the_floors():
    page = (ROOT.parents[1] / "CONTRIBUTING.md").read_text("utf-8")
    line = next(line for line in page.splitlines() if line.startswith("- **Imports point downward"))
    at = page.index(line)
    words = page[at : page.index("\n- **", at + 1)].replace("`", " ").replace(",", " ").split()
    stated = [FLOOR[word] for word in words if word in FLOOR]
    assert len(set(stated)) == len(FLOORS)
    assert all(a <= b for a, b in pairwise(stated))
