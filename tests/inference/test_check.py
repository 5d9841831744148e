"""What can be said of a model from its configuration alone."""

import json

import pytest
import transformers
from typer.testing import CliRunner

from families import FAMILIES
from tokenfuse.cli import app
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.inference.check import Support, check_model
from tokenfuse.inference.load import load
from tokenfuse.micro import CHECKPOINT


def test_the_micro_model():
    found = check_model(CHECKPOINT)
    assert (found.adapter, found.shows) == ("qwen3_vl", ["image", "video"])
    assert found.supplies == ["saliency", "text"]
    assert found.strategies["ttf"] == ["pre_llm"]
    assert "4 layers; expected 1 to 3" in found.refused["framefusion"]
    assert Support.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "internvl", "video_llava", "paligemma"])
def test_it_says_what_attach_says(name, tmp_path):
    """Of an empty model the same as of a real one: attach raises just what is refused."""
    import tokenfuse

    model = FAMILIES[name].build("sdpa")
    model.config.save_pretrained(tmp_path)
    found = check_model(tmp_path)
    assert found.architecture == type(model).__name__
    for strategy in ("ttf", "fastv", "pixelprune", "attention"):
        if strategy in found.strategies:
            tokenfuse.attach(model, strategy).detach()
        else:
            with pytest.raises(tokenfuse.TokenFuseError) as error:
                tokenfuse.attach(model, strategy)
            assert str(error.value) == found.refused[strategy]


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="cannot be loaded as an image-text-to-text"):
        check_model(tmp_path)


@pytest.mark.parametrize("ask", [check_model, load])
def test_a_hub_out_of_reach_is_said(ask, monkeypatch):
    """What transformers raises then, without trying the network again and again."""

    def fails(source, **options):
        raise OSError("We couldn't connect to 'https://hub' to load the files")

    for auto in (transformers.AutoConfig, transformers.AutoProcessor):
        monkeypatch.setattr(auto, "from_pretrained", fails)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UnsupportedModelError, match="not in the cache, and the hub cannot be"):
        ask("somebody/nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnsupportedModelError, match="not in the cache, and HF_HUB_OFFLINE is"):
        ask("somebody/nothing")


def test_the_command():
    cli = CliRunner()
    done = cli.invoke(app, ["check", str(CHECKPOINT)])
    assert done.exit_code == 0, done.output
    assert "adapter     qwen3_vl" in done.stdout
    assert "not framefusion: strategy framefusion acts at layer 4" in done.stdout
    done = cli.invoke(app, ["check", str(CHECKPOINT), "--json"])
    assert json.loads(done.stdout)["adapter"] == "qwen3_vl"
