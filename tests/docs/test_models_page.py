"""docs/models.md says what is true: its tables of classes here, its names of timm in tests/hosts/test_timm_names.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import vtoken

pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "make_models.py"


def make_models() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_tables_of_classes_are_what_the_script_writes() -> None:
    script, page = make_models(), SCRIPT.with_name("models.md").read_text()
    tables = script.tables()
    told = {title: text for title, text in tables.items() if f"## {title}\n" in page}
    if not told:
        pytest.skip(f"the page was written for other versions than {', '.join(tables)}")
    for title, text in told.items():
        assert f"## {title}\n\n{text}\n" in page, "python docs/make_models.py writes the page anew"
    assert len(tables) == 2


#: Of each mapping's kind one whose refusal must name its own reason, or the part that can be patched.
REFUSED = {
    "SamModel": "windows", "Sam2Model": "grid of patches", "SwinModel": "windows", "HieraModel": "grid between stages",
    "PvtV2ForImageClassification": "between stages", "ConvNextModel": "convolutional",
    "YolosModel": "detection tokens", "ViTMAEForPreTraining": "kept token", "VideoMAEForPreTraining": "visible token",
    "VJEPA2Model": "place in the row", "TimesformerModel": "time and space", "DPTModel": "neck",
    "BlipModel": "one projection", "AriaForConditionalGeneration": "image sizes",
    "Blip2ForImageTextRetrieval": "queries", "FuyuForCausalLM": "no image tower",
    "Gemma4ForConditionalGeneration": "pools", "Llama4VisionModel": "into channels",
    "FastVlmForConditionalGeneration": "several stages", "Sapiens2Backbone": "share keys",
    "MLCDVisionModel": "one table", "Mistral3ForConditionalGeneration": "one row", "DepthProModel": "place by place",
    "ImageGPTModel": "causal", "DetrForObjectDetection": "backbone", "Qwen2VLForConditionalGeneration": "one row",
    "PaliGemmaForConditionalGeneration": r"use vtoken\.apply\(model\.model\.vision_tower",
    "VisionEncoderDecoderModel": "cross-attention",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_of_transformers_classes_have_a_reason(name: str) -> None:
    import transformers

    if name == "VisionEncoderDecoderModel":
        parts = transformers.ViTConfig(num_hidden_layers=1), transformers.BertConfig(num_hidden_layers=1)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        with torch.device("meta"):
            model = transformers.VisionEncoderDecoderModel(config)
    else:
        model = make_models()._small(getattr(transformers, name))
    with pytest.raises(vtoken.UnsupportedModelError, match=REFUSED[name]):
        vtoken.apply(model, vtoken.PiToMe(ratio=0.9))


@pytest.mark.slow
def test_no_class_of_the_auto_mappings_is_lost() -> None:
    """The page's count, which may only grow: more that work, fewer of which nothing is known."""
    script, page = make_models(), SCRIPT.with_name("models.md").read_text()
    answers = script.survey()
    assert len(answers["yes"]) >= 49, answers["yes"]
    assert len(answers["yes"]) + len(answers["reason"]) >= 260
    if f"## transformers {script.transformers.__version__}\n" in page:
        assert script.told(answers) in page, "python docs/make_models.py writes the page anew"
        assert len(answers["unknown"]) <= 1, answers["unknown"]
