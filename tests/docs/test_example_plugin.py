"""The example plug-in in an environment of its own: installed, used, tested and uninstalled."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "examples" / "plugin"
CONFIG = "configs/checkerboard.yaml"


class Environment:
    """A new virtual environment that sees the packages of this one, and the plug-in's folder."""

    def __init__(self, home):
        # A copy, so that nothing is written beside the sources.
        self.folder = home / "plugin"
        litter = shutil.ignore_patterns("__pycache__", ".*", "build", "dist")
        shutil.copytree(SOURCE, self.folder, ignore=litter)
        place = {"base": str(home / "venv")}
        self.call(sys.executable, "-m", "venv", place["base"])
        self.python = os.path.join(sysconfig.get_path("scripts", "venv", place), "python")
        # As site directories, so that the .pth file of an editable tokenfuse counts, too.
        lines = (f"import site; site.addsitedir({path!r})" for path in site.getsitepackages())
        packages = Path(sysconfig.get_path("purelib", "venv", place))
        (packages / "outside.pth").write_text("\n".join(lines))

    def call(self, *command, expected=0, **variables):
        """What a command prints to stdout and stderr; it must end with the ``expected`` status."""
        own = ("TOKENFUSE_PLUGINS", "PYTEST_ADDOPTS")
        env = {name: value for name, value in os.environ.items() if name not in own}
        # For tiny tensors, over which a second thread only keeps the first waiting.
        env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "PluginWarning" not in done.stderr
        return done

    def pip(self, *arguments):
        self.call(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def tokenfuse(self, *arguments, **options):
        """What the command line prints as JSON."""
        return json.loads(self.tell(*arguments, **options).stdout)

    def tell(self, *arguments, **options):
        return self.call(self.python, "-m", "tokenfuse", *arguments, **options)

    def listed(self, what, **variables):
        """Who brought each strategy or adapter."""
        return {x["name"]: x["from"] for x in self.tokenfuse(what, "--json", **variables)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment with the plug-in's wheel."""
    environment = Environment(tmp_path_factory.mktemp("plugin"))
    build = "import sys, hatchling.build as backend; backend.build_wheel(sys.argv[1])"
    wheels = environment.folder / "dist"
    environment.call(sys.executable, "-c", build, str(wheels))
    (wheel,) = wheels.glob("*.whl")
    environment.pip("install", "--no-index", "--no-deps", str(wheel))
    return environment


def test_its_strategy_is_listed_with_the_distribution(installed):
    assert installed.listed("strategies")["checkerboard"] == "tokenfuse-example"


def test_its_adapter_is_listed_with_the_distribution(installed):
    assert installed.listed("adapters")["lfm2_vl"] == "tokenfuse-example"


def test_the_schema_has_its_options(installed):
    properties = installed.tokenfuse("schema")["$defs"]["checkerboard"]["properties"]
    assert properties["period"]["default"] == 2
    assert properties["pattern"]["enum"] == ["diagonal", "rows", "columns"]


def test_a_misspelt_option_is_told_the_nearest(installed):
    (installed.folder / "wrong.yaml").write_text("strategy: checkerboard\nperiods: 3\n")
    error = installed.tell("run", "--strategy", "wrong.yaml", expected=2).stderr
    assert "wrong.yaml, line 2" in error
    assert 'did you mean "period"?' in error


def test_its_strategy_compresses_the_sample(installed):
    options = ("--no-compare", "--repeats", "1", "--max-new-tokens", "4")
    report = installed.tokenfuse("run", "--strategy", CONFIG, *options, "--json")["report"]
    assert report["strategy"]["strategy"] == "checkerboard"
    (item,) = report["items"]
    assert item["frame_tokens_after"] == [18] * 8
    assert (report["tokens_before"], report["tokens_after"]) == (288, 144)


def test_its_own_tests_pass(installed):
    done = installed.call(installed.python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in done.stdout


def test_the_environment_variable_hides_it(installed):
    assert "checkerboard" not in installed.listed("strategies", TOKENFUSE_PLUGINS="")


def test_nothing_of_it_is_left_after_uninstalling(installed):
    # The last test: it takes away what the others need.
    installed.pip("uninstall", "--yes", "tokenfuse-example")
    assert set(installed.listed("strategies").values()) == {"tokenfuse"}
    error = installed.tell("run", "--strategy", CONFIG, expected=2).stderr
    assert 'no strategy or preset is called "checkerboard"' in error
