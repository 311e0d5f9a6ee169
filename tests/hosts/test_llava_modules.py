"""A LLaVA whose prompt is shortened runs its tower through the modules of the model, whatever the tower carries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vtoken

transformers = pytest.importorskip("transformers")

PITOME, VTCCLS = vtoken.PiToMe(ratio=0.9), vtoken.VTCCLS(num_tokens=6)


def small_llava() -> Any:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8
    )
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=59)
    return transformers.LlavaForConditionalGeneration(config).eval()


def call_of(model: Any) -> dict[str, Any]:
    places = vtoken.num_tokens(model)
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1] + [59] * places + [7]]), "pixel_values": pixels}


def patched(order: str) -> Any:
    model = small_llava()
    if order == "tower first":
        vtoken.apply(model.model.vision_tower, PITOME)
    vtoken.apply(model, VTCCLS)
    if order == "tower last":
        vtoken.apply(model.model.vision_tower, PITOME)
    return model


@pytest.mark.parametrize("order", ["prompt alone", "tower first", "tower last"])
def test_hooks_and_compiled_parts_of_the_tower(order: str) -> None:
    model = patched(order)
    call = call_of(model)
    known, strange = set(model.modules()), []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        if module not in known:
            strange.append(type(module).__name__)

    seen: list[nn.Module] = []
    tower = model.model.vision_tower
    layer = tower.encoder.layers[2]
    for module in (tower, tower.encoder, layer, layer.self_attn, layer.self_attn.k_proj):
        module.register_forward_hook(lambda m, args, out: seen.append(m))
    handle = torch.nn.modules.module.register_module_forward_hook(note)
    with torch.no_grad():
        expected = model(**call).logits
        handle.remove()
        assert strange == []
        assert seen == [layer.self_attn.k_proj, layer.self_attn, layer, tower.encoder, tower]
        for part in ("", ".encoder", ".encoder.layers.2.self_attn"):
            torch._dynamo.reset()
            module = model.get_submodule(f"model.vision_tower{part}")
            module.compile(backend="eager")
            assert torch.equal(model(**call).logits, expected), part
            module._compiled_call_impl = None
    torch._dynamo.reset()


def test_both_parts_come_and_go_in_any_order() -> None:
    bare, alone = small_llava(), {}
    classes = [type(m) for m in bare.modules()]
    for name, order in (("prompt", "prompt alone"), ("both", "tower first")):
        model = patched(order)
        alone[name] = (model(**call_of(model)).logits, call_of(model))
    for order in ("tower first", "tower last"):
        model = patched(order)
        tower = model.model.vision_tower
        assert torch.equal(model(**alone["both"][1]).logits, alone["both"][0])
        vtoken.remove(tower)
        assert not vtoken.is_applied(tower)
        assert vtoken.config_of(model) == VTCCLS
        assert torch.equal(model(**alone["prompt"][1]).logits, alone["prompt"][0])
        vtoken.apply(tower, PITOME)
        vtoken.remove(model, "vtc_cls")
        assert vtoken.config_of(model) == PITOME
        vtoken.remove(model)
        assert [type(m) for m in model.modules()] == classes
        assert not any(key.startswith("_vtoken") for m in model.modules() for key in vars(m))


def test_a_watched_tower_alone_is_the_towers_own() -> None:
    model = small_llava()
    tower, call = model.model.vision_tower, call_of(model)
    stock = tower(call["pixel_values"], output_attentions=True, output_hidden_states=True)
    vtoken.apply(model, VTCCLS)
    found = tower(call["pixel_values"], output_attentions=True, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, stock.last_hidden_state)
    assert len(found.hidden_states) == len(stock.hidden_states)
    assert not vtoken.is_applied(tower)
    with pytest.raises(vtoken.VTokenError, match="nothing to remove"):
        vtoken.remove(tower)
    assert vtoken.cls_attention_scores(tower, call["pixel_values"]).shape == (1, 36)
