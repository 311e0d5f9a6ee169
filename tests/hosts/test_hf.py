"""transformers image models and LLaVA towers: what is theirs alone. (Promises of every host: tests/contract.)"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.helpers import assert_close
from vtoken.core.method import BlockMethod

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).resolve().parents[2] / "docs/tasks/image_prompts.md"
PITOME = vtoken.PiToMe(ratio=0.8)
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DINO: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"layerscale_value": 0.7}
IMAGE_TOKEN = 59


def seeded(model: nn.Module, std: float = 0.2) -> Any:
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * std
    return model.eval()


def images(batch: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def clip_vision(**options: Any) -> Any:
    return seeded(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**(SMALL | options))))


def llava(tower: str = "clip", **options: Any) -> Any:
    vision = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}[tower](**SMALL)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=256)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, **options)
    return seeded(transformers.LlavaForConditionalGeneration(config))


def prompt(count: int, batch: int = 2) -> dict[str, Tensor]:
    """Text, `count` placeholders, text."""
    ids = torch.tensor([[1, 5, 6] + [IMAGE_TOKEN] * count + [7, 8, 9]] * batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_hidden_states_leave_in_raster_order() -> None:
    model, x = clip_vision(), images()
    with torch.no_grad():
        vtoken.apply(model, PITOME)
        out, trace = vtoken.trace(model, x, output_hidden_states=True)
        assert [h.shape[1] for h in out.hidden_states] == trace.tokens == [65, 53, 43, 35]
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        vtoken.configure(model, order="internal")
        internal, _ = vtoken.trace(model, x, output_hidden_states=True)
        for layer, (ordered, rows) in enumerate(zip(out.hidden_states, internal.hidden_states, strict=True)):
            same_rows = torch.equal(ordered.sort(1).values, rows.sort(1).values)
            assert same_rows, f"layer {layer} has other rows"
        assert not torch.equal(internal.last_hidden_state, out.last_hidden_state)
        # A merged token keeps the place of its anchor: unmerging gives the anchor's patch its own group's row.
        dense = vtoken.unmerge(out.last_hidden_state, trace)
        for b in range(2):
            assert torch.equal(dense[b, trace.anchor[b]], out.last_hidden_state[b])
        again = model(x, output_hidden_states=True)
        assert len(again.hidden_states) == 4, "the host's recording hooks are installed once"


def test_tuple_output_and_selected_hidden_states() -> None:
    model, x = clip_vision(), images()
    with torch.no_grad():
        vtoken.apply(model, PITOME)
        out = model(x)
        assert isinstance(out, transformers.modeling_outputs.BaseModelOutputWithPooling)
        as_tuple = model(x, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], out.last_hidden_state)
        assert torch.equal(as_tuple[1], out.pooler_output)
        model.config.output_hidden_states = True
        assert len(model(x).hidden_states) == 4


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2", "registers"])
@pytest.mark.parametrize("config", [PITOME, vtoken.RandomPrune(ratio=0.7, seed=2)], ids=lambda c: c.method)
def test_heads_that_average_weigh_tokens_by_their_size(kind: str, config: Any) -> None:
    """The classifier of a merged model is that of the full map: every patch shows its group's value."""
    both = {"vision_config": SMALL, "text_config": TEXT | {"max_position_embeddings": 8}, "num_labels": 5}
    dino = DINO | {"num_labels": 5}
    model: Any
    if kind == "clip":
        model = transformers.CLIPForImageClassification(transformers.CLIPConfig(**both))
    elif kind == "siglip":
        model = transformers.SiglipForImageClassification(transformers.SiglipConfig(**both))
    elif kind == "siglip2":
        vision = {k: v for k, v in SMALL.items() if k != "image_size"} | {"num_patches": 64}
        both["vision_config"] = vision
        model = transformers.Siglip2ForImageClassification(transformers.Siglip2Config(**both))
    elif kind == "dinov2":
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**dino))
    else:
        model = transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**dino, num_register_tokens=3)
        )
    model = seeded(model).double()
    inputs: dict[str, Tensor] = {"pixel_values": images().double()}
    if kind == "siglip2":
        rows = inputs["pixel_values"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        inputs = {"pixel_values": rows, "pixel_attention_mask": torch.ones(2, 64, dtype=torch.long),
                  "spatial_shapes": torch.tensor([[8, 8], [8, 8]])}  # fmt: skip
    attribute = {"clip": "vision_model", "siglip": "vision_model", "siglip2": "vision_model", "dinov2": "dinov2",
                 "registers": "dinov2_with_registers"}[kind]  # fmt: skip
    with torch.no_grad():
        vtoken.apply(model, config)
        logits = model(**inputs).logits
        tower = getattr(model, attribute)
        out, trace = vtoken.trace(tower, **inputs)
        rows = (
            out.last_hidden_state if config.method == "random_prune" else vtoken.unmerge(out.last_hidden_state, trace)
        )
        first = trace.num_prefix
        mean = rows[:, first:].mean(1)
        feature = torch.cat([rows[:, 0], mean], 1) if kind in ("dinov2", "registers") else mean
        assert_close("logits", model.classifier(feature), logits, 1e-12)
        plain = out.last_hidden_state[:, first:].mean(1)
        if config is PITOME:
            assert float((plain - mean).abs().max()) > 1e-3, "weighing was to matter"
        # Removing the tower's patch alone leaves a head that works.
        vtoken.remove(tower)
        stock = model(**inputs).logits
        vtoken.remove(model)
        assert torch.equal(model(**inputs).logits, stock)


def test_siglip_pool_is_told_the_sizes() -> None:
    model = seeded(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL))).double()
    x = images().double()
    with torch.no_grad():
        vtoken.apply(model, PITOME)
        out, trace = vtoken.trace(model, x)
        dense = vtoken.unmerge(out.last_hidden_state, trace)
        assert_close("pooled", model.head(dense), out.pooler_output, 1e-12)
        assert float((model.head(out.last_hidden_state) - out.pooler_output).abs().max()) > 1e-3


def test_padded_siglip2_batches_are_refused() -> None:
    vision = {k: v for k, v in SMALL.items() if k != "image_size"} | {"num_patches": 64}
    model = seeded(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision)))
    rows, mask = torch.randn(2, 64, 48), torch.ones(2, 64, dtype=torch.long)
    shapes = torch.tensor([[8, 8], [4, 16]])
    with torch.no_grad():
        stock = model(rows, mask, shapes).last_hidden_state
        mask[1, 60:] = 0
        padded = model(rows, mask, shapes).last_hidden_state
        with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
            assert torch.equal(model(rows, mask, shapes).last_hidden_state, padded)
        vtoken.apply(model, PITOME)
        with pytest.raises(vtoken.InputError, match="padding"):
            model(rows, mask, shapes)
        out, trace = vtoken.trace(model, rows, torch.ones_like(mask), spatial_shapes=shapes)
    assert trace.grid is None, "images of different shapes have no common grid"
    assert out.last_hidden_state.shape[1] == 34 < stock.shape[1]


def test_backbone_maps_are_dense() -> None:
    config = transformers.Dinov2Config(**DINO, out_features=["stage1", "stage3"], reshape_hidden_states=True)
    model, x = seeded(transformers.Dinov2Backbone(config)), images()
    with torch.no_grad():
        stock = model(x).feature_maps
        vtoken.apply(model, PITOME)
        maps = model(x)
        assert "hidden_states" not in maps
        assert [m.shape for m in maps.feature_maps] == [m.shape for m in stock]
        _, trace = vtoken.trace(model, x)
        for layer, found in ((0, maps.feature_maps[0]), (2, maps.feature_maps[1])):
            groups = trace.layer_dest[layer][:, 1:]
            flat = found.flatten(2).transpose(1, 2)
            for b in range(2):
                for g in groups[b].unique():
                    members = flat[b, groups[b] == g]
                    assert torch.equal(members, members[:1].expand_as(members)), "a group shows one value"
            assert torch.unique(flat[0], dim=0).shape[0] == trace.tokens[layer + 1] - 1
        assert torch.equal(model(x, output_hidden_states=True).feature_maps[1], maps.feature_maps[1])
        vtoken.remove(model)
        assert all(map(torch.equal, model(x).feature_maps, stock))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation: str) -> None:
    model, x = clip_vision(), images()
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        model.set_attn_implementation(implementation)
        assert_close(implementation, expected, model(x).last_hidden_state, 1e-5)


def test_flash_attention_takes_no_sizes() -> None:
    model, x = clip_vision(), images()
    model.config._attn_implementation_internal = "flash_attention_2"
    before = [type(m) for m in model.modules()]
    with pytest.raises(vtoken.InputError, match="prop_attn=False"):
        vtoken.apply(model, PITOME)
    assert [type(m) for m in model.modules()] == before
    model.config._attn_implementation_internal = "sdpa"
    vtoken.apply(model, PITOME)
    seen: list[Any] = []

    def flash(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **options: Any) -> Any:
        seen.append(attention_mask)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    transformers.AttentionInterface.register("my_flash", flash)
    model.config._attn_implementation_internal = "my_flash"
    with torch.no_grad():
        with pytest.raises(vtoken.InputError, match="my_flash"):  # changed after apply
            model(x)
        seen.clear()
        vtoken.configure(model, prop_attn=False)
        assert model(x).last_hidden_state.shape[1] == 35
    assert seen == [None, None, None]


def test_attention_maps_and_masks_are_refused() -> None:
    model = seeded(transformers.ViTModel(transformers.ViTConfig(**SMALL, attn_implementation="eager")))
    x, mask = images(), torch.ones(2, 65, dtype=torch.long)
    mask[0, 50:] = 0
    with torch.no_grad():
        stock = model(x, output_attentions=True, attention_mask=mask)
        with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
            same = model(x, output_attentions=True, attention_mask=mask)
            assert torch.equal(stock.last_hidden_state, same.last_hidden_state)
            assert all(map(torch.equal, stock.attentions, same.attentions))
        vtoken.apply(model, PITOME)
        with pytest.raises(vtoken.InputError, match="output_attentions"):
            model(x, output_attentions=True)
        with pytest.raises(vtoken.InputError, match="mask"):
            model(x, attention_mask=mask)
        assert model(x).last_hidden_state.shape[1] == 35


@pytest.mark.parametrize("size", [(32, 48), (48, 24)])
def test_other_image_sizes(size: tuple[int, int]) -> None:
    model = clip_vision()
    vtoken.apply(model, PITOME)
    x = images(size=size)
    with torch.no_grad():
        _, trace = vtoken.trace(model, x, interpolate_pos_encoding=True)
    assert trace.grid == (size[0] // 4, size[1] // 4)
    assert tuple(trace.tokens) == vtoken.plan(model, img_size=size).tokens
    assert vtoken.report(model, input_size=(3, *size)).tokens == tuple(trace.tokens)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = clip_vision(), images()
    vtoken.apply(model, PITOME)
    model.save_pretrained(tmp_path)
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    assert type(again) is transformers.CLIPVisionModel
    with pytest.warns(vtoken.VTokenWarning, match="not applied"):
        assert not vtoken.is_applied(again)
    vtoken.apply(again, PITOME)
    with torch.no_grad():
        assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state)


def test_whole_clip_leaves_the_text_tower_alone() -> None:
    config = transformers.CLIPConfig(vision_config=SMALL, text_config=TEXT | {"max_position_embeddings": 8})
    model, x = seeded(transformers.CLIPModel(config)), images()
    ids = torch.tensor([[1, 4, 5, 2], [1, 6, 7, 2]])
    with torch.no_grad():
        stock = model(input_ids=ids, pixel_values=x)
        vtoken.apply(model, PITOME)
        assert not any("_vtoken_index" in m.__dict__ for m in model.text_model.modules())
        merged = model(input_ids=ids, pixel_values=x)
        assert torch.equal(merged.text_embeds, stock.text_embeds)
        assert not torch.equal(merged.image_embeds, stock.image_embeds)
        assert vtoken.report(model).tokens == (65, 53, 43, 35)
        assert vtoken.num_tokens(model) == 35
        vtoken.remove(model)
        assert torch.equal(model(input_ids=ids, pixel_values=x).logits_per_image, stock.logits_per_image)


@pytest.mark.parametrize(
    ("tower", "layer", "strategy", "count"),
    [("clip", -2, "default", 42), ("clip", -1, "default", 34), ("clip", 1, "full", 53), ("siglip", -2, "full", 42)],
)
def test_llava_reads_reduced_features_in_raster_order(tower: str, layer: int, strategy: str, count: int) -> None:
    model = llava(tower, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    x = images()
    full = 64 + int(strategy == "full" and tower == "clip")
    with torch.no_grad():
        assert vtoken.num_tokens(model) == full
        stock = model(**prompt(full), pixel_values=x).logits
        text_only = model(**prompt(0)).logits
        vtoken.apply(model, PITOME)
        assert vtoken.num_tokens(model) == count
        assert vtoken.plan(model).tokens[-1] < vtoken.plan(model).tokens[0]
        out, trace = vtoken.trace(model, **prompt(count), pixel_values=x)
        assert trace.tokens == list(vtoken.report(model).tokens)
        # By hand: the tower's rows, ordered by the patch they keep the place of, projected, put into the prompt.
        vision = copy.deepcopy(model.model.vision_tower)
        vtoken.configure(vision, order="internal")
        states, own = vtoken.trace(vision, x, output_hidden_states=True)
        index = layer if layer >= 0 else len(states.hidden_states) + layer
        anchors = _anchors(vision, x, index)
        rows = torch.stack([h[a.argsort()] for h, a in zip(states.hidden_states[index], anchors, strict=True)])
        features = model.model.multi_modal_projector(rows[:, 1:] if strategy == "default" else rows)
        ids = prompt(count)["input_ids"]
        embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE_TOKEN).unsqueeze(-1), features)
        by_hand = model(inputs_embeds=embeds, attention_mask=prompt(count)["attention_mask"]).logits
        assert_close("logits", by_hand, out.logits, 1e-6)
        assert own.tokens == trace.tokens
        with pytest.raises(ValueError, match="do not match"):
            model(**prompt(full), pixel_values=x)
        ids = model.generate(**prompt(count), pixel_values=x, max_new_tokens=4, do_sample=False)
        assert torch.equal(ids[:, -4], out.logits[:, -1].argmax(-1))
        assert torch.equal(model(**prompt(0)).logits, text_only)
        vtoken.remove(model)
        assert torch.equal(model(**prompt(full), pixel_values=x).logits, stock)


def _anchors(vision: Any, x: Tensor, index: int) -> Tensor:
    """Anchors in the tower's own row order after `index` layers, read off a state that the test makes itself."""
    from vtoken.core.state import TokenState
    from vtoken.hosts.transformers.families import num_prefix

    state = TokenState(vision._vtoken.methods[BlockMethod], num_prefix(vision), track_anchor=True, track_dest=False)
    vtoken.remove(bare := copy.deepcopy(vision))
    embedded = bare.embeddings(x)
    h = bare.pre_layrnorm(embedded) if hasattr(bare, "pre_layrnorm") else embedded
    for block in vision.encoder.layers:
        h = block(h, None, vtoken_state=state)
    anchor = state.slots[index].anchor
    assert anchor is not None
    return anchor


def test_llava_recipe_of_the_page() -> None:
    """The processor's own setting for extra tokens takes the difference."""
    model = llava(vision_feature_layer=-2, vision_feature_select_strategy="default")
    processor = transformers.LlavaProcessor.__new__(transformers.LlavaProcessor)
    processor.patch_size, processor.image_token = 4, "<image>"
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "default", 1
    pixels = {"pixel_values": images().numpy()}
    assert processor.replace_image_token(pixels, 0).count("<image>") == vtoken.num_tokens(model) == 64
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    [snippet] = [text for text in snippets if "num_additional_image_tokens" in text]
    exec(compile(snippet, str(PAGE), "exec"), {"model": model, "processor": processor, "vtoken": vtoken})
    assert vtoken.is_applied(model)
    assert processor.replace_image_token(pixels, 0).count("<image>") == vtoken.num_tokens(model) < 64


def test_llava_15_counts_of_the_specification() -> None:
    """576 patches, 23 of 24 layers (docs/methods/pitome.md 11)."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
        )
    counts = [vtoken.num_tokens(model, vtoken.PiToMe(ratio=r)) for r in (0.975, 0.95, 0.925, 0.9, 0.875)]
    assert counts == [330, 183, 101, 54, 30]
    cost = vtoken.report(model, vtoken.PiToMe(ratio=0.9))
    matching = cost.matching_macs / 1e9
    assert cost.macs_before / 1e9 == pytest.approx(190.96, abs=0.06)
    assert cost.macs_after / 1e9 - matching == pytest.approx(67.34, abs=0.06)


def _refused() -> dict[str, Any]:
    t = transformers
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = t.CLIPVisionConfig(**SMALL)
    text = t.LlamaConfig(**TEXT, num_key_value_heads=2)
    both = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN}
    return {
        "made for a table of position biases": lambda: t.BeitModel(t.BeitConfig(**tiny, image_size=32, patch_size=8)),
        "windows": lambda: t.SwinModel(t.SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2])),
        "does not know": lambda: t.ViTForMaskedImageModeling(t.ViTConfig(**SMALL)),
        "tiles": lambda: t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(**both, image_grid_pinpoints=[[32, 32]])
        ),
        "joins the hidden states": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(**both, vision_feature_layer=[-2, -1])
        ),
        "single layer": lambda: clip_vision().encoder.layers[0],
        "reads text, no images": lambda: t.Data2VecTextForSequenceClassification(
            t.Data2VecTextConfig(**tiny, vocab_size=20, max_position_embeddings=16)
        ),
        "CLIPTextModel": lambda: t.CLIPTextModel(t.CLIPTextConfig(**TEXT)),
    }


@pytest.mark.parametrize("reason", list(_refused()))
def test_refusals_say_why_and_leave_the_model_alone(reason: str) -> None:
    model = _refused()[reason]()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(vtoken.UnsupportedModelError, match=reason) as error:
        vtoken.apply(model, PITOME)
    assert "The model was left as it was" in str(error.value)
    assert [type(m) for m in model.modules()] == classes
    if reason == "tiles":
        assert "model.model.vision_tower" in str(error.value)


def test_user_subclasses() -> None:
    class Doubling(transformers.CLIPVisionModel):  # type: ignore[misc,name-defined]
        def forward(self, pixel_values: Tensor, **options: Any) -> Any:
            out = super().forward(pixel_values, **options)
            out.pooler_output = 2 * out.pooler_output
            return out

    model, plain, x = seeded(Doubling(transformers.CLIPVisionConfig(**SMALL))), clip_vision(), images()
    with torch.no_grad():
        vtoken.apply(model, PITOME)
        vtoken.apply(plain, PITOME)
        assert torch.equal(model(x).pooler_output, 2 * plain(x).pooler_output)
        assert len(model(x, output_hidden_states=True).hidden_states) == 4

    class OwnLayer(type(plain.encoder.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Tensor:
            return hidden_states

    vtoken.remove(plain)
    plain.encoder.layers[1].__class__ = OwnLayer
    with pytest.raises(vtoken.UnsupportedModelError, match=r"layers\.1.*forward of its own"):
        vtoken.apply(plain, PITOME)
