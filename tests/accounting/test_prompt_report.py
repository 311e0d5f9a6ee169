"""Prefill and cache by formula, and the report of a whole prompt; check values of docs/methods/vtc_cls.md 13."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import vtoken
from vtoken.accounting.prefill import Decoder, kv_cache_bytes, prefill_flops, prefill_macs

LLAMA_7B = Decoder(layers=32, width=4096, mlp_width=11008, kv_width=4096)
LLAMA_13B = Decoder(layers=40, width=5120, mlp_width=13824, kv_width=5120)


@pytest.mark.parametrize(
    ("tokens", "alone", "with_text", "relative", "mebibytes"),
    [(576, 3.817, 4.225, 1.0, 288), (288, 1.887, 2.285, 0.541, 144), (256, 1.675, 2.073, 0.491, 128),
     (192, 1.253, 1.649, 0.390, 96), (144, 0.938, 1.332, 0.315, 72), (128, 0.833, 1.227, 0.290, 64),
     (64, 0.416, 0.807, 0.191, 32), (32, 0.208, 0.598, 0.142, 16)],
)  # fmt: skip
def test_table(tokens: int, alone: float, with_text: float, relative: float, mebibytes: int) -> None:
    assert prefill_macs(LLAMA_7B, tokens) / 1e12 == pytest.approx(alone, abs=6e-4)
    assert prefill_macs(LLAMA_7B, tokens + 60) / 1e12 == pytest.approx(with_text, abs=6e-4)
    assert prefill_macs(LLAMA_7B, tokens + 60) / prefill_macs(LLAMA_7B, 636) == pytest.approx(relative, abs=6e-4)
    assert kv_cache_bytes(LLAMA_7B, tokens) == mebibytes * 2**20
    assert prefill_flops(LLAMA_7B, tokens) == 2 * prefill_macs(LLAMA_7B, tokens)


@pytest.mark.parametrize(
    ("tokens", "macs", "mebibytes"), [(2880, 20.83, 1440), (640, 4.25, 320), (320, 2.10, 160), (160, 1.04, 80)]
)
def test_crops(tokens: int, macs: float, mebibytes: int) -> None:
    assert prefill_macs(LLAMA_7B, tokens) / 1e12 == pytest.approx(macs, abs=6e-3)
    assert kv_cache_bytes(LLAMA_7B, tokens) == mebibytes * 2**20


def test_one_token() -> None:
    linear = prefill_macs(LLAMA_7B, 1) - 32 * 2 * 4096
    assert linear / 1e9 == pytest.approx(6.476, abs=6e-4)
    assert kv_cache_bytes(LLAMA_7B, 1) == 524_288
    assert kv_cache_bytes(LLAMA_13B, 1) == 819_200
    assert kv_cache_bytes(LLAMA_7B, 1, bytes_per_element=4) == 2 * 524_288


def llava(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    t = pytest.importorskip("transformers")
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "image_size": 336, "patch_size": 14}  # fmt: skip
    llama = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 32, "vocab_size": 100}  # fmt: skip
    with torch.device("meta"):
        return t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**(large | (vision or {}))),
                text_config=t.LlamaConfig(**(llama | (text or {}))),
                image_token_id=59,
            )
        )


def test_measures_are_read_from_models_and_configurations() -> None:
    model = llava({"num_key_value_heads": 8, "num_hidden_layers": 2})
    decoder = Decoder(layers=2, width=4096, mlp_width=11008, kv_width=1024)
    for source in (model, model.config, model.config.text_config, decoder):
        assert Decoder.of(source) == decoder
        assert prefill_macs(source, 10) == prefill_macs(decoder, 10)
    with pytest.raises(vtoken.ConfigError, match="-1"):
        vtoken.kv_cache_bytes(decoder, -1)
    with pytest.raises(vtoken.ConfigError, match="Linear"):
        vtoken.prefill_flops(torch.nn.Linear(2, 2), 3)


def test_formula_agrees_with_counted_work() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = llava({"num_hidden_layers": 2, "num_key_value_heads": 8, "hidden_size": 256, "intermediate_size": 512,
                   "num_attention_heads": 8}, {"num_hidden_layers": 2})  # fmt: skip
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.language_model(input_ids=torch.zeros(1, 70, dtype=torch.long, device="meta"))
    assert prefill_flops(model, 70) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_report_of_llava_7b() -> None:
    model = llava()
    cost = vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=64))
    assert (cost.before.image_tokens, cost.after.image_tokens) == (576, 64)
    assert cost.before.tower_macs / 1e9 == pytest.approx(190.96, abs=0.06)
    assert (cost.after.tower_macs - cost.before.tower_macs) == 7 * 577 * 1024
    assert cost.before.projector_macs / 1e9 == pytest.approx(12.1, abs=0.05) == cost.after.projector_macs / 1e9
    assert cost.before.prefill_macs / 1e12 == pytest.approx(4.225, abs=6e-4)
    assert cost.after.prefill_macs / 1e12 == pytest.approx(0.807, abs=6e-4)
    assert cost.after.macs / 1e12 == pytest.approx(1.01, abs=6e-3)
    assert (cost.before.cache_bytes - cost.after.cache_bytes) == 512 * 524_288
    assert cost.prefill_factor == pytest.approx(1 / 0.191, rel=3e-3)
    assert cost.exact
    assert json.loads(json.dumps(cost.to_dict()))["after"]["image_tokens"] == 64
    assert "576" in str(cost)
    assert "factor 4.38" in str(cost)
    two = vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=64), images=2, text_tokens=10)
    assert two.after.prefill_macs == prefill_macs(LLAMA_7B, 138)
    assert two.before.tower_macs == 2 * cost.before.tower_macs


def test_composed_report() -> None:
    model = llava({"num_hidden_layers": 2}, {"num_hidden_layers": 6})
    tower, prompt = vtoken.PiToMe(ratio=0.9), vtoken.VTCCLS(num_tokens=64, start_layer=2)
    expected = vtoken.report(model, tower)
    cost = vtoken.prompt_report(model, [tower, prompt])
    assert cost.before.tower_macs == pytest.approx(expected.macs_before, abs=6)
    scoring = cost.after.tower_macs - expected.macs_after
    rows = vtoken.plan(model, tower).tokens
    assert scoring == pytest.approx(1024 * sum(rows[2:5]), abs=6)
    assert cost.after.projector_macs * 576 == cost.before.projector_macs * (rows[5] - 1)
    assert cost.after.image_tokens == 64
    vtoken.apply(model, [tower, prompt])
    assert vtoken.prompt_report(model) == cost
    assert vtoken.report(model).macs_after == expected.macs_after
    assert vtoken.is_applied(model)


def test_reports_need_the_right_method() -> None:
    model = llava({"num_hidden_layers": 1}, {"num_hidden_layers": 2})
    with pytest.raises(vtoken.ConfigError, match="acts in the prompt"):
        vtoken.prompt_report(model, vtoken.PiToMe(ratio=0.9))
    with pytest.raises(vtoken.ConfigError, match="prompt_report"):
        vtoken.report(model, vtoken.VTCCLS(num_tokens=3))
    with pytest.raises(vtoken.ShapeError, match="image size"):
        vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=3), image_size=(0, 3))


def test_received_scores_of_one_layer() -> None:
    """One layer of SigLIP-so400m costs 0.6 GMAC (docs/methods/vtc_cls.md 9)."""
    t = pytest.importorskip("transformers")
    vision = t.SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
                                  num_attention_heads=16, image_size=384, patch_size=14)  # fmt: skip
    text = t.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = t.LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1,
                           vision_feature_select_strategy="full", image_token_id=59)  # fmt: skip
    with torch.device("meta"):
        model = t.LlavaForConditionalGeneration(config)
    cost = vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=64))
    assert (cost.after.tower_macs - cost.before.tower_macs) / 1e9 == pytest.approx(0.61, abs=0.01)
    assert cost.before.image_tokens == 729


@pytest.mark.parametrize(
    "wrong", [{"images": -1}, {"images": 0}, {"text_tokens": -1}, {"bytes_per_element": 0}, {"images": 1.5}], ids=str
)
def test_counts_that_no_prompt_has(wrong: dict[str, Any]) -> None:
    from tests.hosts.llavas import build

    with pytest.raises(vtoken.ConfigError, match=next(iter(wrong))):
        vtoken.prompt_report(build("llava"), vtoken.VTCCLS(num_tokens=3), **wrong)
