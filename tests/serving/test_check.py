"""What a server is told before it starts, without an engine: settings, counts, hand-over."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vtoken
from tests.serving import tiny
from vtoken.__main__ import main
from vtoken.serving.pruning import Pruning, settings_in
from vtoken.serving.vllm import SERVED, register

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_check_names_the_class_and_the_settings(kind: str) -> None:
    newline = {"newline": "all"} if kind == "llava_next" else {}
    found = vtoken.serving.check(tiny.config_of(kind), "divprune", num_tokens=4, **newline)
    assert found["architectures"] == [tiny.ARCHITECTURES[kind]]
    config = tiny.config_of(kind)
    config.vtoken = found["vtoken"]
    assert settings_in(config) == vtoken.DivPrune(num_tokens=4, **newline)
    config.vtoken = {"method": "divprune", "num_tokens": 4, **newline}  # as people write it
    assert settings_in(config) == vtoken.DivPrune(num_tokens=4, **newline)


REFUSED: list[tuple[str, Any, str]] = [
    ("llava", vtoken.PiToMe(ratio=0.9), "pitome cannot be served"),
    ("llava", vtoken.CDPruner(num_tokens=4), "reads the text"),
    ("llava", vtoken.VTCCLS(num_tokens=4, positions="original"), "one by one"),
    ("llava_next", vtoken.VTCCLS(num_tokens=4), "newline='all'"),
    ("qwen2_5_vl", vtoken.VTCCLS(num_tokens=4, scorer="cls"), "no class token"),
    ("qwen2_5_vl", vtoken.VTCCLS(num_tokens=4, start_layer=0), "windows"),
    ("qwen2_5_vl", vtoken.DivPrune(num_tokens=4, positions="compact"), "three"),
]


@pytest.mark.parametrize(("kind", "settings", "told"), REFUSED, ids=[f"{k}-{told}" for k, _, told in REFUSED])
def test_what_cannot_be_served_is_refused_before_an_engine_starts(kind: str, settings: Any, told: str) -> None:
    with pytest.raises(vtoken.ConfigError, match=told):
        vtoken.serving.check(tiny.config_of(kind), settings)


def test_wrong_words_and_models() -> None:
    config = tiny.config_of("llava")
    with pytest.raises(vtoken.ConfigError, match="did you mean 'vtc_cls'"):
        vtoken.serving.check(config, "vtc_cl", num_tokens=4)
    with pytest.raises(vtoken.ConfigError, match="stand beside"):
        vtoken.serving.check(config, vtoken.VTCCLS(num_tokens=4), num_tokens=5)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"llama models.*llava, llava_next, qwen2_vl"):
        vtoken.serving.check(transformers.LlamaConfig(), "divprune", num_tokens=4)
    vision = transformers.PixtralVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    pixtral = transformers.LlavaConfig(vision_config=vision, vision_feature_select_strategy="full")
    with pytest.raises(vtoken.UnsupportedModelError, match="CLIP or SigLIP tower"):
        vtoken.serving.check(pixtral, "divprune", num_tokens=4)
    with pytest.raises(vtoken.ConfigError, match="no settings"):
        settings_in(config)
    config.vtoken = {"num_tokens": 4}
    with pytest.raises(vtoken.ConfigError, match='names no "method"'):
        settings_in(config)


def test_a_saved_model_brings_its_settings(tmp_path: Path) -> None:
    tiny.save("llava", tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    vtoken.apply(model, vtoken.VisionZip(num_tokens=4)).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert settings_in(config) == vtoken.VisionZip(num_tokens=4)
    assert Pruning(config, settings_in(config)).settings == vtoken.VisionZip(num_tokens=4)
    config.vtoken = config.vtoken | {"method": "divprune", "keep_ratio": 0.5}  # an engine's own go first
    assert settings_in(config) == vtoken.DivPrune(keep_ratio=0.5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_counts_are_those_of_a_call(kind: str, tmp_path: Path) -> None:
    """The stand-in has no weights, the model has; the rows that a call keeps are counted."""
    folder = tiny.save(kind, tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    settings = vtoken.DivPrune(num_tokens=5, newline="all")
    pruning = Pruning(config, settings)
    model = vtoken.apply(transformers.AutoModelForImageTextToText.from_pretrained(folder), settings)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    images = [tiny.image(0, (56, 56)), tiny.image(1, (112, 84) if kind != "llava" else (56, 56))]
    given = processor(text=[tiny.prompt(kind, 0, 2)], images=images, return_tensors="pt")
    assert all(p.is_meta for p in pruning.model.parameters())
    for asked in ({}, {"num_tokens": 2}, {"keep_ratio": 0.8}, {"num_tokens": 999}):
        with vtoken.budget(model, **asked):
            kept = vtoken.encode_images(model, given)
        lengths = [pruning.length(v, pruning.asked(asked)) for v in pruning.visuals(given)]
        assert lengths == [len(one.rows) for one in kept]
    handed = vtoken.serving.image_embeds(kept, given)
    if kind.startswith("llava"):
        assert [rows.shape for rows in handed] == [one.rows.shape for one in kept]
        return
    assert handed["image_rows"].tolist() == [len(one.kept) for one in kept]
    assert handed["image_embeds"].shape == (sum(lengths), 64 * (1 + len(kept[0].deeper)))
    columns = int(given["image_grid_thw"][1, 2]) // 2
    last = handed["image_kept"][lengths[0] :]
    assert torch.equal(kept[1].places[1], last // columns)
    assert torch.equal(kept[1].places[2], last % columns)
    with pytest.raises(vtoken.InputError, match="image_grid_thw of 2"):
        vtoken.serving.image_embeds(kept, {"image_grid_thw": given["image_grid_thw"][:1]})


def test_what_a_request_may_ask_for() -> None:
    pruning = Pruning(tiny.config_of("llava"), vtoken.VTCCLS(num_tokens=4))
    for asked, told in (
        ({"num_token": 4}, "did you mean 'num_tokens'"), ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": [1, 2]}, "one number"), ({"num_tokens": 2, "keep_ratio": 0.5}, "exactly one"),
        ({"start_layer": 1}, "keep_ratio, num_tokens per request"), (4, "is a dict"),
    ):  # fmt: skip
        with pytest.raises((vtoken.ConfigError, vtoken.InputError), match=told):
            pruning.asked(asked)


def test_the_entry_point_is_there_and_vllm_is_only_needed_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert written["vllm.general_plugins"] == {"vtoken": f"{register.__module__}:register"}
    for name, module in SERVED.values():
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"class {name}(" in text
    try:
        import vllm  # noqa: F401
    except ImportError:
        assert main(["serve-check", str(ROOT), "--method", "divprune", "num_tokens=4"]) == 2
        assert "vLLM is not installed" in capsys.readouterr().err
