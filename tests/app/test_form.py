"""The form of a strategy: every option, and nothing but what was changed comes back."""

import pytest

from tokenfuse.app.form import configured, fields, offered
from tokenfuse.config import get_configuration, get_strategy
from tokenfuse.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize("name", offered())
def test_a_form_shows_every_option_and_untouched_means_the_strategy_itself(name):
    form = fields(name)
    options = set(type(get_strategy(name)).model_fields) - {"compose", "video", "image"}
    assert {field.name for field in form} == options
    assert all(field.about for field in form)
    mapping = configured(name, {field.name: field.shown for field in form})
    assert mapping == {"strategy": name}
    assert get_configuration(mapping).strategy == get_strategy(name)


def test_what_is_changed_is_what_the_configuration_has():
    values = {"keep_ratio": 0.25, "anchor": "3", "guard": "motion", "window": 5.0}
    mapping = configured("ttf", values)
    assert mapping == {"strategy": "ttf", **values, "anchor": 3, "window": 5}
    assert get_configuration(mapping).strategy == get_strategy("ttf", **values | {"anchor": 3})


def test_kinds_follow_the_types_of_options():
    kinds = {field.name: field.kind for field in fields("ttf")}
    assert (kinds["threshold"], kinds["guard"], kinds["anchor"]) == ("number", "choice", "text")
    whole = {field.name: field.whole for field in fields("ttf") if field.kind == "number"}
    assert (whole["window"], whole["threshold"]) == (True, False)
    assert {field.kind for field in fields("pixelprune") if field.name == "anchored"} == {"flag"}


def test_lists_are_written_as_in_a_file():
    values = {"layers": "[1, 3]", "keep_ratio": "[0.5, 0.25]"}
    made = get_configuration(configured("pyramiddrop", values)).strategy
    assert made == get_strategy("pyramiddrop", layers=[1, 3], keep_ratio=[0.5, 0.25])


def test_a_visitor_can_name_no_file(tmp_path):
    file = tmp_path / "secret.yaml"
    file.write_text("strategy: ttf")
    for name in (str(file), "compose", "by_modality"):
        with pytest.raises(UnknownNameError):
            fields(name)
    made = [type(get_strategy(name)).name for name in offered()]
    assert "ttf" in made
    assert not {"compose", "video", "image"} & {f.name for n in offered() for f in fields(n)}


def test_a_blank_box_of_an_option_that_may_be_blank_is_none():
    mapping = configured("ttf-causal", {"keep_ratio": None})
    assert get_configuration(mapping).strategy == get_strategy("ttf-causal", keep_ratio=None)


def test_what_is_wrong_is_named():
    with pytest.raises(ConfigError, match=r"anchor: .* is no YAML"):
        configured("ttf", {"anchor": "[1"})
    with pytest.raises(ConfigError, match="window"):
        get_configuration(configured("ttf", {"window": 4}))
    with pytest.raises(UnknownNameError, match="did you mean"):
        fields("tff")
