"""Strategies from names, mappings and files, what wrong ones are told, and the JSON Schema."""

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from tokenfuse import FusionPlan, Strategy, VisualTokens, get_strategy, hookimpl
from tokenfuse.config import Configuration, get_configuration, json_schema, presets
from tokenfuse.errors import ConfigError, UnknownNameError
from tokenfuse.registry import Registry
from tokenfuse.strategies.ttf import TTF

CONFIGS = Path(__file__).parents[1] / "configs"
BUILT_IN = Registry(installed=False)


class Limits(BaseModel):
    least: int = 1


class Stranger(Strategy):
    """A strategy that no one registers."""

    name: ClassVar[str] = "stranger"
    share: float = 0.5
    limits: Limits = Limits()

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        return FusionPlan.identity(tokens.num_tokens)


class Brought:
    """A plugin that registers Stranger."""

    @hookimpl
    def tokenfuse_register_strategies(self, register):
        register(Stranger)


@pytest.fixture
def write(tmp_path):
    """A function from YAML text to the file that holds it."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def refusal(write):
    """A function from YAML text to the message of the ConfigError that it raises."""

    def refusal(text, kind=ConfigError):
        with pytest.raises(ConfigError) as caught:
            get_strategy(write(text))
        assert type(caught.value) is kind
        return str(caught.value)

    return refusal


# Every form of StrategyLike


@pytest.mark.parametrize("overrides", [None, {}, {"window": 5}])
@pytest.mark.parametrize("form", ["name", "preset", "text", "path", "mapping", "instance"])
def test_every_form_loads_with_and_without_overrides(form, overrides, write):
    path = write("strategy: ttf\nthreshold: 0.9\n")
    source = {
        "name": "ttf",
        "preset": "ttf-gentle",
        "text": str(path),
        "path": path,
        "mapping": {"strategy": "ttf", "threshold": 0.9},
        "instance": TTF(threshold=0.9),
    }[form]
    expected = TTF(threshold=0.7 if form == "name" else 0.9, **(overrides or {}))
    assert get_strategy(source, **(overrides or {})) == expected


def test_a_strategy_by_name_takes_its_options():
    assert get_strategy("ttf", keep_ratio=0.5, window=5) == TTF(keep_ratio=0.5, window=5)
    with pytest.raises(ConfigError, match=r'unknown key windw of ttf: did you mean "window"\?'):
        get_strategy("ttf", windw=5)


def test_an_instance_comes_back_itself():
    mine = TTF()
    assert get_strategy(mine) is mine


def test_an_instance_need_not_be_registered_to_be_overridden():
    changed = get_strategy(Stranger(limits=Limits(least=4)), share=0.25)
    assert changed == Stranger(share=0.25, limits=Limits(least=4))


def test_loading_changes_neither_the_mapping_nor_the_overrides():
    source, overrides = {"strategy": "ttf", "window": 5}, {"threshold": 0.5}
    get_strategy(source, **overrides)
    assert source == {"strategy": "ttf", "window": 5}
    assert overrides == {"threshold": 0.5}


def test_an_override_may_name_another_strategy():
    among = Registry([Brought()], installed=False)
    assert get_strategy("ttf", strategy="stranger", registry=among) == Stranger()
    with pytest.raises(ConfigError, match="unknown key threshold of stranger"):
        get_strategy(TTF(), strategy="stranger", registry=among)


def test_a_file_may_have_any_name_and_any_encoding_of_yaml(tmp_path):
    path = tmp_path / "settings"
    path.write_bytes("strategy: ttf\nthreshold: 0.9 # größer\n".encode("utf-16"))
    assert get_strategy(path) == TTF(threshold=0.9)
    assert get_strategy(str(path)) == TTF(threshold=0.9)


def test_numbers_that_yaml_reads_as_text_are_numbers(write):
    assert get_strategy(write("strategy: ttf\nthreshold: 9e-1")).threshold == 0.9


# Keys


def test_an_unknown_key_is_refused_with_file_line_and_nearest_name(refusal):
    message = refusal("strategy: ttf\n# a comment\nthresold: 0.5\n")
    assert re.search(r'mine\.yaml, line 3: unknown key thresold of ttf: did you mean "thr', message)
    assert "valid: anchor, guard, keep_ratio, min_tokens_per_frame" in message


def test_every_wrong_key_is_named_with_its_own_line(refusal):
    message = refusal("strategy: ttf\nthresold: 0.5\nwindow: 4\nreduce: sum\n")
    assert re.findall(r"line (\d): (?:unknown key )?(\w+)", message) == [
        ("3", "window"),
        ("4", "reduce"),
        ("2", "thresold"),
    ]


def test_a_key_that_stands_twice_is_refused(refusal):
    message = refusal("strategy: ttf\nwindow: 3\nthreshold: 0.5\nwindow: 5\n")
    assert message.endswith("mine.yaml, line 4: key window stands twice; remove one")


def test_a_key_inside_another_stands_there_once_too(refusal):
    message = refusal("compose:\n- strategy: ttf\n  window: 3\n  window: 5\n")
    assert message.endswith("mine.yaml, line 4: key window stands twice; remove one")


def test_an_alias_is_no_key_that_stands_twice(write, refusal):
    path = write("compose:\n- &a {strategy: uniform, keep_ratio: 0.5}\n- *a\n")
    assert [step.keep_ratio for step in get_strategy(path).compose] == [0.5, 0.5]
    message = refusal("&a\ncompose: [*a]\n")
    assert "mine.yaml, line 1: compose: " in message
    assert message.endswith("it leads back to itself; remove the part that does")


def test_a_key_that_is_not_text_is_refused(refusal):
    assert "line 2: 7: " in refusal("strategy: ttf\n7: 0.5\n")
    assert "is not valid YAML" in refusal("strategy: ttf\n? [a, b]\n: 0.5\n")


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("pruning_rate", 0.75, "use keep_ratio: 0.25"),
        ("video_pruning_rate", 0.7, "use keep_ratio: 0.3"),
        ("compression_ratio", 0.9, "use keep_ratio: 0.1"),
        ("reduction", 0, "use keep_ratio: 1"),
        ("retention_ratio", 0.25, "use keep_ratio: 0.25"),
        ("compression_ratio", 4, "use keep_ratio, the share of tokens that stay, in (0, 1]"),
        ("pruning_rate", 1, "use keep_ratio, the share of tokens that stay, in (0, 1]"),
        ("pruning_rate", "75%", "use keep_ratio, the share of tokens that stay, in (0, 1]"),
    ],
)
def test_other_projects_ratios_are_translated(refusal, key, value, advice):
    message = refusal(f"strategy: ttf\n{key}: {value}\n")
    assert message.endswith(f"mine.yaml, line 2: unknown key {key}: {advice}")


def test_keep_ratio_is_advised_only_where_there_is_one():
    with pytest.raises(ConfigError, match="unknown key pruning_rate of stranger") as caught:
        get_strategy(Stranger(), pruning_rate=0.75)
    assert "keep_ratio" not in str(caught.value)


# Values


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("threshold", "high", "'high' is wrong: it should be a valid number"),
        ("threshold", ".nan", "nan is wrong: it should be greater than or equal to -1"),
        ("threshold", "", "None is wrong: it should be a valid number"),
        ("window", 4, "4 is wrong: a window has a middle, so it must be odd: 3 or 5"),
        ("window", 2.5, "2.5 is wrong: it should be a valid integer"),
        ("window", -1, "-1 is wrong: it should be greater than or equal to 1"),
        ("keep_ratio", 0, "0 is wrong: it should be greater than 0"),
        ("keep_ratio", 1.2, "1.2 is wrong: it should be less than or equal to 1"),
        ("reduce", "sum", "'sum' is wrong: it should be 'mean' or 'keep'"),
        ("positions", "drop", "'drop' is wrong: it should be 'keep' or 'contiguous'"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_was_expected(
    refusal, key, value, expectation
):
    message = refusal(f"strategy: ttf\n\n{key}: {value}\n")
    assert f"mine.yaml, line 3: {key}: {expectation}" in message


def test_an_option_of_several_types_is_named_once(refusal):
    message = refusal("strategy: ttf\nanchor: medoid\n")
    assert message.count("'medoid'") == 1
    assert "it should be 'auto' or 'first' or it should be a valid integer" in message


def test_options_that_contradict_each_other_name_the_file(refusal):
    message = refusal("strategy: ttf\nreference: previous\nanchor: 2\n")
    assert "mine.yaml: ttf: reference: previous starts at the first frame" in message
    assert message.endswith("use anchor: first")


def test_a_wrong_override_is_not_blamed_on_the_file(write):
    path = write("strategy: ttf\nthreshold: 0.5\n")
    for overrides in ({"threshold": "x"}, {"thresold": 1}, {"strategy": "x"}):
        with pytest.raises(ConfigError) as caught:
            get_strategy(path, **overrides)
        assert "mine.yaml" not in str(caught.value)


# Files and names


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds nothing; expected a mapping such as strategy: ttf"),
        ("# only a comment\n", "holds nothing; expected a mapping such as strategy: ttf"),
        ("- ttf\n", "holds a list; expected a mapping such as strategy: ttf"),
        ("ttf\n", "holds a single value; expected a mapping such as strategy: ttf"),
        ("window: [3\n", "is not valid YAML: "),
        ("strategy: ttf\n---\nstrategy: ttf\n", "is not valid YAML: expected a single document"),
        (b"strategy: ttf\nreduce: \xff\n", "is not valid YAML: "),
        (b"strategy: ttf\nreduce: \x00\n", "is not valid YAML: "),
        ("strategy: ttf\nthreshold: 2001-13-41\n", "line 2 is not valid YAML: month must be in"),
        ("strategy: ttf\nwindow: !!int abc\n", "line 2 is not valid YAML: invalid literal for int"),
        (f"strategy: ttf\nwindow: {'9' * 5000}\n", "line 2 is not valid YAML: Exceeds the limit"),
        ("strategy: " + "[" * 5000, "is nested too deeply"),
        ("strategy: ttf\n" + "#" * 2**20, "expected a configuration of no more than 1048576"),
        ("strategy: !!python/name:os.system\n", "is not valid YAML: could not determine a"),
    ],
)
def test_a_file_that_is_no_configuration_says_so(refusal, text, problem):
    message = refusal(text)
    assert re.search(
        f"mine.yaml(, line \\d)? .*{re.escape(problem)}|mine.yaml, {re.escape(problem)}", message
    )
    assert len(message) < 400


@pytest.mark.parametrize("value", ["yes", "true", '"0.5"', "[0.5]", "2001-01-01", "null"])
def test_what_looks_like_a_number_is_none(refusal, value):
    assert "threshold" in refusal(f"strategy: ttf\nthreshold: {value}\n")


def test_a_whole_number_may_be_written_with_a_point(write):
    assert get_strategy(write("strategy: ttf\nwindow: 5.0\nthreshold: 1\n")).window == 5


def test_a_tree_of_aliases_makes_a_short_message(refusal):
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    message = refusal("strategy: tome\n" + "\n".join(rows) + "\nr: *a11\n")
    assert len(message) < 4000


def test_files_that_double_their_parts_are_refused(tmp_path):
    (tmp_path / "f0.yaml").write_text("strategy: uniform\nkeep_ratio: 0.9\n")
    for i in range(1, 15):
        (tmp_path / f"f{i}.yaml").write_text(
            "compose:\n" + f"- {tmp_path / f'f{i - 1}.yaml'}\n" * 2
        )
    with pytest.raises(ConfigError, match="more than 256 parts"):
        get_strategy(tmp_path / "f14.yaml")


def test_files_that_stand_in_each_other_too_deep_are_refused(tmp_path):
    (tmp_path / "f0.yaml").write_text("strategy: uniform\n")
    for i in range(1, 30):
        (tmp_path / f"f{i}.yaml").write_text(f"strategy: {tmp_path / f'f{i - 1}.yaml'}\n")
    with pytest.raises(ConfigError, match="more than 16 deep"):
        get_strategy(tmp_path / "f29.yaml")


def test_a_chain_without_end_is_refused():
    with pytest.raises(ConfigError, match="it has 20000 steps; expected 64 or fewer"):
        get_strategy({"compose": ["uniform"] * 20000})


def test_a_name_of_any_length_makes_a_short_message():
    with pytest.raises(ConfigError) as caught:
        get_strategy("x" * 5000)
    assert len(str(caught.value)) < 800


def test_an_error_does_not_quote_the_lines_of_a_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("root:x:0:0:password: [hidden\n")
    with pytest.raises(ConfigError) as caught:
        get_strategy(str(path))
    assert "password" not in str(caught.value)


def test_a_configuration_without_a_strategy_is_told_how_to_name_it(refusal):
    expected = (
        r"names its strategy; got the keys name, window; expected a line such as strategy: {}"
    )
    assert re.search(expected.format("tome$"), refusal("name: tome\nwindow: 3\n"))
    assert "got the keys window; expected a line such as strategy: ttf" in refusal("window: 3\n")
    with pytest.raises(ConfigError, match="got no key; expected a line such as strategy: ttf"):
        get_strategy({})


@pytest.mark.parametrize("value", ["3", "[ttf]", "{name: ttf}", ""])
def test_a_strategy_that_is_no_name_is_refused(refusal, value):
    assert re.search(r"line 1: strategy: .+ is not a name", refusal(f"strategy: {value}\n"))


def test_an_unknown_strategy_in_a_file_names_the_line(refusal):
    message = refusal("window: 3\nstrategy: tff\n", UnknownNameError)
    assert (
        'mine.yaml, line 2: no strategy or preset is called "tff": did you mean "ttf"?' in message
    )


@pytest.mark.parametrize(
    ("name", "nearest"), [("tff", "ttf"), ("TTF", "ttf"), ("ttf_gentle", "ttf-gentle")]
)
def test_an_unknown_name_is_told_the_nearest_strategy_or_preset(name, nearest):
    with pytest.raises(UnknownNameError) as caught:
        get_strategy(name)
    # KeyError alone would show the message as a quoted repr.
    start = f'no strategy or preset is called "{name}": did you mean "{nearest}"? valid: '
    assert str(caught.value).startswith(start)
    assert {"ttf", "ttf-gentle"} <= set(str(caught.value).removeprefix(start).split(", "))
    assert isinstance(caught.value, KeyError)


def test_a_missing_file_is_told_what_there_is(tmp_path):
    for missing in (tmp_path / "ttf.yaml", "ttf.yaml", str(tmp_path / "ttf")):
        with pytest.raises(ConfigError, match=r'is not a file; .* did you mean "ttf"\? valid: '):
            get_strategy(missing)


@pytest.mark.parametrize("source", [None, 3, ["ttf"], TTF])
def test_what_can_be_no_configuration_is_refused_with_its_type(source):
    with pytest.raises(ConfigError, match=f"is of type {type(source).__name__}; expected a str"):
        get_strategy(source)


# Presets


def test_the_presets_are_the_files_of_configs():
    assert presets() == {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert {"ttf-published", "ttf-third", "ttf-gentle"} <= set(presets())


def test_every_preset_is_reached_by_its_name():
    assert not set(presets()) & set(BUILT_IN.strategies)
    for name, path in presets().items():
        assert get_configuration(name, registry=BUILT_IN) == get_configuration(
            path, registry=BUILT_IN
        )


def test_a_preset_or_a_file_is_the_base_of_further_options(write, tmp_path):
    for base in ("ttf-third", str(CONFIGS / "ttf-third.yaml")):
        expected = TTF(keep_ratio=0.33, window=5)
        assert get_strategy({"strategy": base, "window": 5}) == expected
        assert get_strategy(write(f"strategy: {base}\nwindow: 5\n")) == expected
        assert get_strategy("ttf", strategy=base, window=5) == expected
        chain = get_strategy({"compose": [{"strategy": base, "window": 5}, "uniform"]})
        assert chain.compose[0] == expected
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"window: 7\nstrategy: {write('strategy: ttf-third' + chr(10) + 'window: 5')}")
    assert get_strategy(outer) == TTF(keep_ratio=0.33, window=7)


def test_what_is_wrong_in_a_base_is_said_with_the_place_of_both(write, tmp_path):
    inner = write("strategy: ttf\nwindow: 4\n")
    outer = tmp_path / "outer.yaml"
    outer.write_text(f"threshold: 0.5\nstrategy: {inner}\nreduce: sum\n")
    with pytest.raises(ConfigError) as caught:
        get_strategy(outer)
    message = str(caught.value)
    assert re.search(r"outer\.yaml, line 2: .*mine\.yaml, line 2: window: 4 is wrong", message)
    assert re.search(r"outer\.yaml, line 3: reduce: 'sum' is wrong", message)


def test_a_file_that_is_its_own_base_is_refused(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"strategy: {two}\n")
    two.write_text(f"strategy: {one}\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        get_strategy(one)


# Options about the whole prompt


@pytest.mark.parametrize("form", ["mapping", "file", "options", "configuration"])
def test_prompt_options_stand_at_the_top_of_any_form(form, write):
    values = {"strategy": "ttf", "positions": "contiguous", "attention": "proportional"}
    text = "".join(f"{key}: {value}\n" for key, value in values.items())
    source = {
        "mapping": values,
        "file": write(text),
        "options": "ttf",
        "configuration": Configuration(TTF(), "contiguous", "proportional"),
    }[form]
    options = {"positions": "contiguous", "attention": "proportional"} if form == "options" else {}
    found = get_configuration(source, **options)
    assert found == Configuration(TTF(), "contiguous", "proportional")
    assert get_configuration(found.describe()) == found
    changed = get_configuration(source, **options | {"positions": "keep", "window": 5})
    assert changed == Configuration(TTF(window=5), "keep", "proportional")


def test_a_strategy_alone_has_no_prompt_options():
    assert get_strategy("ttf", positions="keep") == TTF()
    with pytest.raises(ConfigError, match="give positions to compress or attach"):
        get_strategy("ttf", positions="contiguous")


def test_a_wrong_value_of_a_prompt_option_is_refused_with_its_line(write):
    path = write("strategy: ttf\npositions: kept\n")
    with pytest.raises(ConfigError, match=r"line 2: positions: 'kept' is wrong: it should be"):
        get_configuration(path)


def test_the_presets_mean_what_their_names_say():
    published = TTF(threshold=0.7, window=3, anchor="auto", segments="single", guard="none")
    assert get_strategy("ttf-published") == published
    assert get_strategy("ttf-third") == TTF(keep_ratio=0.33)
    assert get_strategy("ttf-gentle") == TTF(threshold=0.9)


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_survives_describe(name):
    preset = get_configuration(name, registry=BUILT_IN)
    again = json.loads(json.dumps(preset.describe()))
    assert get_configuration(again, registry=BUILT_IN) == preset


@pytest.mark.parametrize("path", presets().values(), ids=lambda path: path.stem)
def test_a_preset_says_where_its_schema_is_and_what_it_is_for(path):
    schema, purpose, *rest = path.read_text("utf-8").splitlines()
    assert schema == "# yaml-language-server: $schema=schema.json"
    assert re.fullmatch(r"# [A-Z].*\.", purpose)
    options = {line.partition(":")[0] for line in rest}
    chosen = get_strategy(path, registry=BUILT_IN)
    assert options <= set(json_schema(BUILT_IN)["$defs"][chosen.name]["properties"])


# JSON Schema


def test_the_schema_of_the_presets_is_current():
    kept = json.loads((CONFIGS / "schema.json").read_text("utf-8"))
    assert kept == json.loads(json.dumps(json_schema(BUILT_IN))), (
        'renew it: TOKENFUSE_PLUGINS="" tokenfuse schema > configs/schema.json'
    )


def references(schema):
    """Every ``$ref`` in a JSON Schema."""
    if isinstance(schema, list):
        return [found for part in schema for found in references(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if "$ref" in schema else []
    return own + [found for part in schema.values() for found in references(part)]


def test_the_schema_tells_strategies_apart_by_name_and_knows_those_of_plugins():
    schema = json_schema(Registry([Brought()], installed=False))
    names = {ref["$ref"].removeprefix("#/$defs/") for ref in schema["oneOf"]}
    assert names == {*BUILT_IN.strategies, "stranger"}
    for name in names:
        alternative = schema["$defs"][name]
        assert alternative["properties"]["strategy"] == {"const": name}
        expected = {"compose": ["compose"], "by_modality": []}.get(name, ["strategy"])
        assert alternative.get("required", [])[:1] == expected
        assert alternative["additionalProperties"] is False
    assert schema["discriminator"] == {"propertyName": "strategy"}
    assert schema["$defs"]["stranger"]["properties"]["share"]["default"] == 0.5


def test_the_schema_wants_a_strategy_for_videos_or_for_images_where_no_name_is_given():
    alternative = json_schema(BUILT_IN)["$defs"]["by_modality"]
    assert alternative["anyOf"] == [{"required": ["video"]}, {"required": ["image"]}]
    for modality in ("video", "image"):
        kinds = {kind["type"] for kind in alternative["properties"][modality]["anyOf"]}
        assert kinds == {"string", "object", "null"}


def test_options_of_like_named_types_do_not_meet_in_the_schema():
    class Second(Stranger):
        name: ClassVar[str] = "second"
        limits: type("Limits", (BaseModel,), {"__annotations__": {"most": int}})

    class Plugin:
        @hookimpl
        def tokenfuse_register_strategies(self, register):
            register(Stranger)
            register(Second)

    schema = json_schema(Registry([Plugin()], installed=False))
    limits = {}
    for reference in references(schema):
        found = schema
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        limits[reference] = set(found["properties"])
    assert limits["#/$defs/stranger/$defs/Limits"] == {"least"}
    assert limits["#/$defs/second/$defs/Limits"] == {"most"}
