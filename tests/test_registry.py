"""Plugins: what they bring, and that one which fails takes nothing else down."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
import types
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import tokenfuse
from tokenfuse import Adapter, FusionPlan, Strategy, VisualTokens, builtin, hookimpl
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.errors import ConfigError, PluginError, UnknownNameError, UnsupportedModelError
from tokenfuse.registry import PluginWarning, Registry
from tokenfuse.strategies.ttf import TTF


class KeepAll(Strategy):
    """A strategy that needs nothing."""

    name: ClassVar[str] = "keep_all"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        return FusionPlan.identity(tokens.num_tokens)


class KeepMost(KeepAll):
    name: ClassVar[str] = "keep_most"


class Nameless(Strategy):
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        return FusionPlan.identity(tokens.num_tokens)


class Unfinished(Strategy):
    name: ClassVar[str] = "unfinished"


class Narrow(Qwen3VL):
    """One checkpoint of a family that has an adapter."""

    name: ClassVar[str] = "narrow"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and model.config.checkpoint == "narrow"


class Anything(Adapter):
    """An adapter that derives from no built-in one."""

    name: ClassVar[str] = "anything"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return hasattr(model, "config")


class Broken(Anything):
    name: ClassVar[str] = "broken"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return model.no_such_attribute


def strategies_plugin(*classes, name="plugin"):
    """A module that registers strategies."""

    @hookimpl
    def tokenfuse_register_strategies(register):
        for cls in classes:
            register(cls)

    module = types.ModuleType(name)
    module.tokenfuse_register_strategies = tokenfuse_register_strategies
    return module


def adapters_plugin(*classes):
    """An object that registers adapters."""

    class Plugin:
        @hookimpl
        def tokenfuse_register_adapters(self, register):
            for cls in classes:
                register(cls)

    return Plugin()


def registry_of(*plugins):
    return Registry(plugins, installed=False)


class Fake:
    base_model_prefix = "model"
    base_model = None

    def __init__(self, config):
        self.config = config

    def forward(self, mm_encoder_outputs=None):
        raise NotImplementedError


def model(model_type="qwen3_vl", checkpoint="wide"):
    """As much of a Qwen3-VL as ``matches`` looks at."""
    return Fake(SimpleNamespace(model_type=model_type, checkpoint=checkpoint))


@dataclass
class Distribution:
    name: str | None


@dataclass
class EntryPoint:
    """An entry point whose module is at hand, or whose loading raises."""

    name: str
    module: Any
    dist: Distribution | None
    value: str = "some_package.plugin"

    def load(self):
        if isinstance(self.module, Exception):
            raise self.module
        return self.module


@pytest.fixture
def install(monkeypatch):
    """A function that makes entry points the only installed ones."""
    monkeypatch.delenv("TOKENFUSE_PLUGINS", raising=False)

    def install(*points):
        def select(*, group):
            return [point for point in points if group == "tokenfuse"]

        every = SimpleNamespace(name="all", entry_points=SimpleNamespace(select=select))
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: [every])

    return install


# What there is


def test_built_ins_come_through_the_same_hooks_from_tokenfuse():
    found = registry_of()
    assert found.strategies["ttf"].cls is TTF
    assert found.adapters["qwen3_vl"].cls is Qwen3VL
    assert {entry.distribution for entry in found.strategies.values()} == {"tokenfuse"}
    registered = []
    builtin.tokenfuse_register_strategies(register=registered.append)
    assert registered == [entry.cls for entry in found.strategies.values()]


def test_every_built_in_is_named_as_its_file():
    found = registry_of()
    for entry in (*found.strategies.values(), *found.adapters.values()):
        assert entry.cls.__module__.rpartition(".")[2] == entry.cls.name


def test_modules_and_objects_are_plugins_and_are_named():
    found = registry_of(strategies_plugin(KeepAll, name="my_module"), adapters_plugin(Anything))
    assert found.strategies["keep_all"].cls is KeepAll
    assert found.strategies["keep_all"].distribution == "my_module"
    assert found.adapters["anything"].distribution == "Plugin"
    assert "keep_all" not in registry_of().strategies


def test_public_listings_are_copies_with_the_distribution():
    listed = tokenfuse.list_strategies()
    assert listed["ttf"].distribution == "tokenfuse"
    listed.clear()
    assert "ttf" in tokenfuse.list_strategies()
    assert tokenfuse.list_adapters()["qwen3_vl"].cls is Qwen3VL


def test_an_unknown_strategy_is_told_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        registry_of(strategies_plugin(KeepAll)).strategy("keepall")
    hint, _, valid = str(caught.value).partition("valid: ")
    assert hint == 'no strategy is called "keepall": did you mean "keep_all"? '
    assert valid.split(", ") == sorted({*tokenfuse.list_strategies(), "keep_all"})


# Plugins that fail


def test_a_plugin_that_cannot_be_imported_is_named_and_the_rest_works(install):
    install(
        EntryPoint("a", ImportError("no module named gone"), Distribution("dist-a")),
        EntryPoint("b", strategies_plugin(KeepAll), Distribution("dist-b")),
    )
    with pytest.warns(PluginWarning) as caught:
        found = Registry()
    assert [str(w.message) for w in caught] == [
        "tokenfuse plugin dist-a cannot be loaded (some_package.plugin): "
        "ImportError: no module named gone"
    ]
    assert found.strategies["keep_all"].distribution == "dist-b"
    assert "ttf" in found.strategies


@pytest.mark.parametrize("dist", [None, Distribution(None)])
def test_an_entry_point_without_a_distribution_is_named_by_its_value(install, dist):
    install(EntryPoint("a", strategies_plugin(KeepAll), dist))
    assert Registry().strategies["keep_all"].distribution == "some_package.plugin"


def test_a_plugin_that_raises_while_registering_keeps_what_it_brought_before(install):
    class Half:
        @hookimpl
        def tokenfuse_register_strategies(self, register):
            register(KeepAll)
            raise RuntimeError("half way")

        @hookimpl
        def tokenfuse_register_adapters(self, register):
            register(Anything)

    install(
        EntryPoint("half", Half(), Distribution("dist-half")),
        EntryPoint("whole", strategies_plugin(KeepMost), Distribution("dist-whole")),
    )
    message = "plugin dist-half raised in tokenfuse_register_strategies: RuntimeError: half way"
    with pytest.warns(PluginWarning, match=message):
        found = Registry()
    assert {"ttf", "keep_all", "keep_most"} <= set(found.strategies)
    assert {"qwen3_vl", "anything"} <= set(found.adapters)


@pytest.mark.parametrize(
    "rubbish", [Nameless, Unfinished, Strategy, Anything, KeepAll(), "ttf", None, list[int]]
)
def test_what_is_no_strategy_is_not_registered(install, rubbish):
    install(
        EntryPoint("a", strategies_plugin(rubbish), Distribution("dist-a")),
        EntryPoint("b", strategies_plugin(KeepMost), Distribution("dist-b")),
    )
    expected = (
        f"plugin dist-a raised in tokenfuse_register_strategies: PluginError: {rubbish!r} is "
        "registered; expected a concrete subclass of tokenfuse.Strategy"
    )
    with pytest.warns(PluginWarning, match=re.escape(expected)):
        found = Registry()
    assert set(found.strategies) == {*registry_of().strategies, "keep_most"}


def test_what_is_no_adapter_is_not_registered():
    with pytest.warns(PluginWarning, match=r"subclass of tokenfuse.Ad"):
        assert set(registry_of(adapters_plugin(KeepAll)).adapters) == set(registry_of().adapters)


class Misspelt:
    @hookimpl
    def tokenfuse_register_strategy(self, register):
        """One letter is not the hook's."""


class TooCurious:
    @hookimpl
    def tokenfuse_compressed(self, report, model):
        """The hook brings no model."""


class Unmarked:
    def tokenfuse_compressed(self, report):
        """Without hookimpl this is a function like any other."""


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        (Misspelt(), r"PluginValidationError: unknown hook 'tokenfuse_register_strategy'"),
        (TooCurious(), r"PluginValidationError: [\s\S]*Argument\(s\) {'model'}"),
        (Unmarked(), r"PluginError: .* implements no hook; expected a function such as"),
        (None, r"PluginError: None implements no hook"),
        ("my_package.plugin", r"PluginError: 'my_package.plugin' implements no hook"),
    ],
)
def test_a_plugin_that_could_never_be_called_is_left_out_and_named(install, plugin, problem):
    install(
        EntryPoint("a", plugin, Distribution("dist-a")),
        EntryPoint("b", strategies_plugin(KeepAll), Distribution("dist-b")),
    )
    with pytest.warns(PluginWarning, match=f"plugin dist-a is left out: {problem}") as caught:
        found = Registry()
    assert len(caught) == 1
    assert {"ttf", "keep_all"} <= set(found.strategies)


# Names that are taken


def test_a_name_registered_twice_is_an_error_naming_both(install):
    install(
        EntryPoint("a", strategies_plugin(KeepAll), Distribution("dist-a")),
        EntryPoint("b", strategies_plugin(KeepAll), Distribution("dist-b")),
    )
    expected = 'strategy "keep_all" is registered twice, by dist-a and by dist-b: rename one, or '
    with pytest.raises(PluginError, match=expected):
        Registry()


def test_a_built_in_name_is_taken():
    class Other(KeepAll):
        name: ClassVar[str] = "ttf"

    with pytest.raises(PluginError, match='"ttf" is registered twice, by tokenfuse and by plugin'):
        registry_of(strategies_plugin(Other))
    with pytest.raises(PluginError, match='adapter "qwen3_vl" is registered twice, by tokenfuse'):
        registry_of(adapters_plugin(Qwen3VL))


def test_a_plugin_cannot_hide_a_name_that_is_taken():
    class Hiding:
        @hookimpl
        def tokenfuse_register_strategies(self, register):
            try:
                register(TTF)
            except Exception:
                return

    with pytest.raises(PluginError, match='"ttf" is registered twice'):
        registry_of(Hiding())


def test_one_module_given_twice_is_one_plugin(install):
    module = strategies_plugin(KeepAll)
    install(
        EntryPoint("a", module, Distribution("dist-a")),
        EntryPoint("b", module, Distribution("dist-b")),
    )
    assert Registry([module, module]).strategies["keep_all"].distribution == "plugin"


def test_plugins_need_not_be_hashable_and_equal_ones_are_still_two():
    @dataclass
    class Counting:
        seen: list

        @hookimpl
        def tokenfuse_compressed(self, report):
            self.seen.append(report)

    first, second = Counting([]), Counting([])
    assert first == second
    with pytest.raises(TypeError):
        hash(first)
    registry_of(first, second).observe("tokenfuse_compressed", report="report")
    assert (first.seen, second.seen) == (["report"], ["report"])


# TOKENFUSE_PLUGINS


@pytest.mark.parametrize(
    ("allowed", "brought"),
    [
        (None, {"keep_all", "keep_most", "third"}),
        ("", set()),
        ("a", {"keep_all"}),
        (" b , c,", {"keep_most", "third"}),
    ],
)
def test_the_environment_limits_the_plugins(install, monkeypatch, allowed, brought):
    class Third(KeepAll):
        name: ClassVar[str] = "third"

    install(
        EntryPoint("a", strategies_plugin(KeepAll), None),
        EntryPoint("b", strategies_plugin(KeepMost), None),
        EntryPoint("c", strategies_plugin(Third), None),
    )
    if allowed is not None:
        monkeypatch.setenv("TOKENFUSE_PLUGINS", allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Registry()
    assert set(found.strategies) - set(registry_of().strategies) == brought


def test_a_plugin_that_is_left_out_is_not_imported(install, monkeypatch):
    install(EntryPoint("bad", SystemError("imported"), Distribution("dist-bad")))
    monkeypatch.setenv("TOKENFUSE_PLUGINS", "")
    assert set(Registry().strategies) == set(registry_of().strategies)


def test_the_environment_names_a_plugin_that_is_not_installed(install, monkeypatch):
    install(EntryPoint("mine", strategies_plugin(KeepAll), None))
    monkeypatch.setenv("TOKENFUSE_PLUGINS", "mime")
    with pytest.warns(PluginWarning, match=r'names "mime", .* not installed: did you mean "mine"'):
        assert "keep_all" not in Registry().strategies


def test_a_real_distribution_is_found_by_its_entry_point(tmp_path, monkeypatch):
    info = tmp_path / "stranger_fuse-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-fuse\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenfuse]\nstranger = stranger_fuse\n")
    (tmp_path / "stranger_fuse.py").write_text(
        "from tests_keep_all import KeepAll\n"
        "from tokenfuse import hookimpl\n"
        "@hookimpl\n"
        "def tokenfuse_register_strategies(register):\n"
        "    register(KeepAll)\n"
    )
    shared = types.ModuleType("tests_keep_all")
    shared.KeepAll = KeepAll
    monkeypatch.setitem(sys.modules, "tests_keep_all", shared)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TOKENFUSE_PLUGINS", "stranger")
    assert Registry().strategies["keep_all"].distribution == "stranger-fuse"
    assert sys.modules.pop("stranger_fuse")


# Observers


def test_observers_get_the_arguments_that_they_ask_for():
    class Observer:
        def __init__(self):
            self.seen = []

        @hookimpl
        def tokenfuse_planned(self, plan, strategy):
            self.seen.append((plan, strategy))

    class Silent:
        @hookimpl
        def tokenfuse_planned(self):
            return "ignored"

    observer = Observer()
    found = registry_of(observer, Silent())
    found.observe("tokenfuse_planned", tokens="tokens", plan="plan", strategy="strategy")
    found.observe("tokenfuse_compressed", report="report")
    assert observer.seen == [("plan", "strategy")]


def test_an_observer_that_raises_is_named_and_the_others_still_see():
    seen = []

    class Raising:
        @hookimpl
        def tokenfuse_compressed(self, report):
            raise ZeroDivisionError("no tokens")

    class Seeing:
        @hookimpl
        def tokenfuse_compressed(self, report):
            seen.append(report)

    class SeeingToo(Seeing):
        pass

    found = registry_of(Seeing(), Raising(), SeeingToo())
    expected = "plugin Raising raised in tokenfuse_compressed: ZeroDivisionError: no tokens"
    with pytest.warns(PluginWarning, match=expected):
        found.observe("tokenfuse_compressed", report="report")
    assert seen == ["report", "report"]


# Adapters


@pytest.mark.parametrize("order", [(Narrow, Anything), (Anything, Narrow)])
def test_the_most_derived_adapter_that_matches_wins(order):
    found = registry_of(adapters_plugin(*order))
    narrow = model(checkpoint="narrow")
    chosen = registry_of(adapters_plugin(Narrow)).adapter(narrow)
    assert type(chosen) is Narrow
    assert chosen.model is narrow
    assert type(found.adapter(model(checkpoint="wide"))) is Qwen3VL
    assert type(found.adapter(model("another_model"))) is Anything


def test_between_strangers_a_built_in_adapter_wins_however_deep_the_other_is():
    class Base(Anything):
        pass

    class Deep(Base):
        name: ClassVar[str] = "deep"

    assert type(registry_of(adapters_plugin(Deep)).adapter(model())) is Qwen3VL


def test_an_adapter_that_raises_while_matching_is_named_and_matches_nothing():
    found = registry_of(adapters_plugin(Broken))
    with pytest.warns(PluginWarning, match=r"plugin Plugin raised in Broken\.matches: Attribute"):
        assert type(found.adapter(model())) is Qwen3VL


def test_a_model_that_no_adapter_matches_is_told_which_there_are():
    with pytest.raises(UnsupportedModelError) as caught:
        registry_of(adapters_plugin(Narrow)).adapter(model("gpt2"))
    message = str(caught.value)
    assert "no model family matches Fake (model_type 'gpt2')" in message
    assert ", ".join(sorted(["narrow", *registry_of().adapters])) in message
    assert isinstance(caught.value, TypeError)
    with pytest.raises(UnsupportedModelError, match="no model family matches object"):
        registry_of().adapter(object())


# --- plugins that break ---------------------------------------------------------------------------


def plugin_at(folder, name, code, entry=None):
    """A distribution with one module, as pip leaves it in a folder of the path."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry or f"[tokenfuse]\n{name} = {name}\n")
    (folder / f"{name}.py").write_text(textwrap.dedent(code))


BREAKING = {
    "exits": "import sys; sys.exit('good bye')",
    "needless": """
        from typing import ClassVar
        from tokenfuse import FusionPlan, Strategy, hookimpl
        class Needless(Strategy):
            name: ClassVar[str] = "needless"
            needs = None
            def plan(self, tokens): return FusionPlan.identity(tokens.num_tokens)
        @hookimpl
        def tokenfuse_register_strategies(register): register(Needless)
    """,
    "talks": "print('I am a plugin')",
    "schemaless": """
        from typing import Any, Callable, ClassVar
        from pydantic import ConfigDict
        from tokenfuse import FusionPlan, Strategy, hookimpl
        class Schemaless(Strategy):
            name: ClassVar[str] = "schemaless"
            made_by: Callable[[int], int] = abs
            def plan(self, tokens): return FusionPlan.identity(tokens.num_tokens)
        @hookimpl
        def tokenfuse_register_strategies(register): register(Schemaless)
    """,
}


@pytest.mark.parametrize("command", [["schema"], ["strategies", "--json"], ["env", "--json"]])
def test_the_rest_keeps_working_and_the_culprit_is_named(tmp_path, command):
    for name, code in BREAKING.items():
        plugin_at(tmp_path, name, code)
    plugin_at(tmp_path, "malformed", "", entry="[tokenfuse\nthis is no = entry = point\n===")
    run = [sys.executable, "-m", "tokenfuse", *command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        run, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    if command[0] == "schema":
        assert "ttf" in found["$defs"]
        assert "schemaless" in done.stderr
    if command[0] == "strategies":
        assert {"ttf", "schemaless"} <= {row["name"] for row in found}
    if command[0] != "env":
        assert "plugin exits cannot be loaded" in done.stderr
        assert "needs None" in done.stderr
    environment["TOKENFUSE_PLUGINS"] = ""
    quiet = subprocess.run(
        run, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert quiet.returncode == 0
    if command[0] != "env":
        assert "PluginWarning" not in quiet.stderr


def test_a_registry_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="registry is 'x'; expected"):
        tokenfuse.get_strategy("ttf", registry="x")
