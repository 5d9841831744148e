"""What the package promises to strangers: its names, errors, docstrings, hooks and light import."""

import builtins
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

import tokenfuse
from tokenfuse import errors
from tokenfuse import hooks as hookspecs

DOCS = Path(__file__).parents[1] / "docs"
FOR_OTHERS = {f"tokenfuse.integrations._vllm_{name}" for name in ("qwen2_5_vl", "qwen3_vl")}
"""Modules that only vLLM imports."""
MODULES = [
    "tokenfuse",
    *(
        m.name
        for m in pkgutil.walk_packages(tokenfuse.__path__, "tokenfuse.")
        if m.name not in FOR_OTHERS
    ),
]
ERRORS = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, Exception)]
HOOKS = [name for name in vars(hookspecs) if name.startswith("tokenfuse_")]


def test_all_is_what_the_design_promises():
    calls = {
        "attach",
        "compress",
        "get_strategy",
        "is_attached",
        "list_adapters",
        "list_strategies",
    }
    results = {"Compressed", "CompressedInputs", "Registered", "Report", "Session"}
    for_authors = {
        "Adapter",
        "FusionPlan",
        "LayerCut",
        "LayerStrategy",
        "LayerTokens",
        "PixelTokens",
        "Strategy",
        "TokenFuseError",
        "TowerCut",
        "TowerStrategy",
        "TowerTokens",
        "VisualTokens",
        "hookimpl",
    }
    assert set(tokenfuse.__all__) == calls | results | for_authors
    assert len(set(tokenfuse.__all__)) == len(tokenfuse.__all__)


def test_all_is_what_there_is():
    submodules = {name.split(".")[1] for name in MODULES if "." in name}
    visible = {name for name in dir(tokenfuse) if not name.startswith("_")}
    helpers = {"annotations", "import_module", "TYPE_CHECKING", "Any"}
    assert visible - submodules - helpers <= set(tokenfuse.__all__)
    assert set(tokenfuse.__all__) <= visible
    for name in tokenfuse.__all__:
        assert getattr(tokenfuse, name).__module__.startswith("tokenfuse") or name == "hookimpl"
    with pytest.raises(AttributeError, match="module 'tokenfuse' has no attribute 'nothing'"):
        _ = tokenfuse.nothing


def test_torch_is_imported_where_it_is_used():
    """Not by the package, nor by what only prints help."""
    for code in ("import tokenfuse", "import tokenfuse.cli", "import tokenfuse.errors"):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}\nprint('torch' in sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "False\n", code


def test_importing_tokenfuse_is_light():
    code = (
        "import sys, tokenfuse\n"
        "tokenfuse.get_strategy('ttf'), tokenfuse.list_strategies(), tokenfuse.list_adapters()\n"
        "heavy = {'transformers', 'torchvision', 'typer', 'rich', 'av', 'matplotlib', 'PIL',"
        " 'pytest', 'hypothesis', 'tokenfuse.testing'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TOKENFUSE_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert "Warning" not in done.stderr


# Errors


def test_every_error_is_a_tokenfuse_error_and_what_the_tree_says():
    lines = re.findall(r"([│├└─ ]*)(\w+Error)(?: \((\w+)\) +(.+))?", errors.__doc__)
    assert [name for _, name, _, _ in lines] == [cls.__name__ for cls in ERRORS]
    parents = [errors.TokenFuseError]
    for indent, name, builtin, meaning in lines[1:]:
        depth = len(indent) // 4
        cls = getattr(errors, name)
        assert issubclass(cls, parents[depth - 1]), name
        assert issubclass(cls, getattr(builtins, builtin)), name
        assert meaning
        parents[depth:] = [cls]


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_shows_its_message_as_it_is(cls):
    message = 'no strategy is called "x": valid: ttf'
    assert str(cls(message)) == message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tff", 'did you mean "ttf"? valid: divprune, ttf'),
        ("TTF", 'did you mean "ttf"? valid: divprune, ttf'),
        ("zebra", "valid: divprune, ttf"),
        ("", "valid: divprune, ttf"),
    ],
)
def test_did_you_mean(given, expected):
    assert errors.did_you_mean(given, ["ttf", "divprune"]) == expected


def test_did_you_mean_where_there_is_nothing():
    assert errors.did_you_mean("ttf", []) == "valid: none"


# Docstrings


def undocumented(module):
    """Public classes, functions and methods that a module defines without a docstring.

    Properties may speak by their names, and ``main`` is what its module's docstring says.
    """
    missing = [] if module.__doc__ else [module.__name__]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) and name != "main" and not inspect.getdoc(value):
            missing.append(name)
        if inspect.isclass(value):
            if not value.__dict__.get("__doc__"):
                missing.append(name)
            for member, raw in vars(value).items():
                plain = member.startswith("_") or isinstance(raw, property | cached_property)
                if plain or not inspect.isroutine(getattr(value, member)):
                    continue
                # A method that overrides means what the one above it says.
                if not inspect.getdoc(getattr(value, member)):
                    missing.append(f"{name}.{member}")
    return missing


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    assert undocumented(importlib.import_module(name)) == []


# Documentation


def test_there_are_the_hooks_that_the_design_names():
    assert HOOKS == [
        "tokenfuse_register_strategies",
        "tokenfuse_register_adapters",
        "tokenfuse_planned",
        "tokenfuse_compressed",
    ]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_one_line_of_docstring_and_a_place_in_the_docs(name):
    spec = getattr(hookspecs, name)
    assert hasattr(spec, "tokenfuse_spec")
    assert re.fullmatch(r"[A-Z].*\.", spec.__doc__)
    page = (DOCS / "reference" / "hooks.md").read_text("utf-8")
    assert f"::: tokenfuse.hooks.{name}\n" in page


@pytest.mark.parametrize("name", [*tokenfuse.__all__, *(cls.__name__ for cls in ERRORS)])
def test_every_public_name_has_a_place_in_the_docs(name):
    page = (DOCS / "reference" / "api.md").read_text("utf-8")
    assert re.search(rf"(::: tokenfuse\.(errors\.)?|tokenfuse\.){name}\b", page)
