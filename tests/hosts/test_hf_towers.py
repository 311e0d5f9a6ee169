"""transformers towers that differ from one of the contract table's in a record alone: the promises, once each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.contract.table import assert_planned, attention, blocks, snapshot
from tests.helpers import assert_all_close, assert_close, assert_same, counted, images, randomise_
from tests.methods.sparse_hosts import taught
from vtoken.core.host import find_adapter
from vtoken.core.patch import base_of

hf = pytest.importorskip("transformers")
from tests.hosts.hf_towers import TOWERS, Tower  # noqa: E402

PITOME = vtoken.PiToMe(ratio=0.75)
every_tower = pytest.mark.parametrize("name", TOWERS)


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tower, Any, Tensor]:
    tower = TOWERS[name]
    x = images((3, 32, 32), (1 if tower.alone else 2) * max(tower.frames, 1), 0, dtype)
    if tower.frames:
        x = x.unflatten(0, (2, tower.frames))
    return tower, randomise_(tower.build(), 0).to(dtype).eval(), x


def outputs(model: Any, x: Tensor, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)  # a ViT-MAE draws its patches
    with torch.no_grad():
        return dict(model(x, output_hidden_states=True, **options))


@every_tower
def test_nothing_changes_where_nothing_is_removed_and_everything_is_undone(name: str) -> None:
    tower, model, x = made(name)
    stock, before = outputs(model, x), snapshot(model)
    with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
        assert_same(f"{name} without reduction", stock, outputs(model, x))
    with vtoken.applied(model, PITOME):
        reduced = outputs(model, x)
    assert reduced.keys() == stock.keys()
    assert (reduced["hidden_states"][-1].shape == stock["hidden_states"][-1].shape) is tower.dense
    last, full = reduced["hidden_states"][-1], stock["hidden_states"][-1]
    assert last.shape != full.shape or not torch.allclose(last, full, rtol=1e-3, atol=1e-3)
    if "feature_maps" in stock:
        assert [m.shape for m in reduced["feature_maps"]] == [m.shape for m in stock["feature_maps"]]
    assert_same(f"{name} undone", stock, outputs(model, x))
    assert [entry[:2] for entry in snapshot(model)] == [entry[:2] for entry in before]


@every_tower
def test_connectivity_masks_are_put_into_the_hosts_own_attention(name: str) -> None:
    """Bit-equal where all keys are kept; else plain attention of that library under the masks that a trace shows."""
    _, model, x = made(name, torch.float64)
    if hasattr(attention(blocks(model)[0]), "attention"):
        pytest.skip("an attention that holds another one is refused")
    stock = outputs(model, x)
    with vtoken.applied(model, vtoken.Sparsifiner(keep_ratio=1.0)):
        assert_same(f"{name} with all keys", stock, outputs(model, x))
    with vtoken.applied(model, vtoken.Sparsifiner(keep_ratio=0.3)):
        taught(model)
        with vtoken.tracing(model, maps=("mask",)) as trace:
            masked = outputs(model, x)
    assert_same(f"{name} undone", stock, outputs(model, x))
    masks = iter([record.mask for record in trace.attention])

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **options: Any) -> Any:
        kept = next(masks)
        assert kept is not None
        logits = (q @ k.transpose(-1, -2) * scaling).masked_fill(~kept, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    hf.AttentionInterface.register("masks_of_a_trace", attend)
    for block in blocks(model):
        attention(block).config._attn_implementation_internal = "masks_of_a_trace"
    expected = outputs(model, x)
    assert next(masks, None) is None
    assert not torch.allclose(masked["hidden_states"][-1], stock["hidden_states"][-1], rtol=1e-3, atol=1e-3)
    assert_all_close(name, expected, masked, 1e-9)


@every_tower
def test_counts_are_those_planned_and_costs_those_counted(name: str) -> None:
    tower, model, x = made(name)
    cost = vtoken.report(model, PITOME)
    counts = []
    for config in (None, PITOME):
        if config is not None:
            vtoken.apply(model, config)
        with counted() as counter:
            model(x[:1])
        counts.append(counter.get_total_flops())
    spec = find_adapter(model).spec(model)
    averaging = sum(2 * (a - b) * (b - spec.num_prefix) * spec.width
                    for a, b in zip(cost.tokens, cost.tokens[1:], strict=False))  # fmt: skip
    assert abs(cost.flops_before - counts[0]) <= 0.01 * counts[0], (cost.flops_before, counts[0])
    assert 0.99 * counts[1] <= cost.flops_after <= 1.01 * counts[1] + averaging, (cost.flops_after, counts[1])
    with torch.no_grad():
        _, trace = vtoken.trace(model, x)
    plan = vtoken.plan(model)
    assert_planned(plan, trace)
    assert plan.num_prefix == trace.num_prefix == tower.prefix
    assert trace.tokens[0] == tower.grid[0] * tower.grid[1] + tower.prefix
    assert trace.grid == tower.grid
    hidden = outputs(model, x)["hidden_states"]
    assert [h.shape[1] for h in hidden] == ([trace.tokens[0]] * 4 if tower.dense else trace.tokens)


@every_tower
def test_settings_travel_with_a_checkpoint(name: str, tmp_path: Path) -> None:
    _, model, x = made(name)
    vtoken.apply(model, PITOME)
    model.save_pretrained(tmp_path)
    again = vtoken.restore(base_of(type(model)).from_pretrained(tmp_path)).eval()
    assert vtoken.config_of(again) == vtoken.config_of(model)
    again.load_state_dict(model.state_dict())  # transformers 5.24 itself loads one norm of PixioBackbone as the other's
    rows = outputs(model, x)["hidden_states"][-1], outputs(again, x)["hidden_states"][-1]
    assert_close(f"{name} loaded again", *rows, 1e-5)


@every_tower
def test_images_of_another_size(name: str) -> None:
    tower, model, _ = made(name)
    vtoken.apply(model, PITOME)
    x = images((3, 40, 24), 1 if tower.alone else 2, 0, torch.float32)
    if tower.any_size is None:
        with pytest.raises(vtoken.ShapeError, match="32"):
            vtoken.plan(model, img_size=(40, 24))
        return
    with torch.no_grad():
        _, trace = vtoken.trace(model, x, **tower.any_size)
    assert tuple(trace.tokens) == vtoken.plan(model, img_size=(40, 24)).tokens
    assert trace.grid == ((1, 30) if name == "vit_mae" else (10, 6))
    assert vtoken.report(model, input_size=(3, 40, 24)).tokens == tuple(trace.tokens)


@every_tower
def test_sizes_are_a_mask_of_log_counts_on_the_keys(name: str) -> None:
    _, model, x = made(name)
    if hasattr(attention(blocks(model)[0]), "attention"):
        pytest.skip("nested attention of transformers before 5.18, which takes no mask: sizes are added around it")
    seen: list[Any] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **options: Any) -> Any:
        seen.append(attention_mask)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return out.transpose(1, 2), None

    hf.AttentionInterface.register("vtoken_seen", attend)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "vtoken_seen"
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        _, trace = vtoken.trace(model, x)
    assert seen[0] is None, "before the first merge there is no mask"
    for layer, mask in enumerate(seen[1:], start=1):
        count = trace.tokens[layer]
        sizes = torch.stack([torch.bincount(d, minlength=count) for d in trace.layer_dest[layer - 1]])
        assert mask.shape == (len(x), 1, count, count)
        found = mask[:, 0].exp().round()
        assert torch.equal(found, found[:, :1].expand_as(found)), "the same for every query"
        assert torch.equal(found[:, 0].sort(1).values, sizes.sort(1).values.float())


@pytest.mark.parametrize("name", ["metaclip_2_mean", "ijepa_mean", "videomae_mean"])
def test_heads_that_average_weigh_tokens_by_their_size(name: str) -> None:
    tower, model, x = made(name, torch.float64)
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        logits = model(x).logits
        out, trace = vtoken.trace(find_adapter(model).tower(model), x)  # type: ignore[attr-defined]
        head = torch.nn.Sequential(getattr(model, "fc_norm", torch.nn.Identity()), model.classifier)
        rows = vtoken.unmerge(out.last_hidden_state, trace)[:, tower.prefix :]
        plain = head(out.last_hidden_state[:, tower.prefix :].mean(1))
        assert_close("logits", head(rows.mean(1)), logits, 1e-12)
    assert float((plain - logits).abs().max()) > 1e-3, "weighing was to matter"


@pytest.mark.parametrize("name", ["aimv2", "aimv2_native"])
def test_the_attention_pool_is_told_the_sizes(name: str) -> None:
    _, model, x = made(name, torch.float64)
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        out, trace = vtoken.trace(model, x)
        dense = vtoken.unmerge(out.last_hidden_state, trace)
        assert_close("pooled", model.head(dense), out.pooler_output, 1e-12)
        assert float((model.head(out.last_hidden_state) - out.pooler_output).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["dinov3_maps", "tipsv2_maps", "pixio_maps"])
def test_maps_show_the_value_of_every_patchs_group(name: str) -> None:
    tower, model, x = made(name)
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        maps = model(x).feature_maps
        _, trace = vtoken.trace(model, x)
    for layer, found in ((0, maps[0]), (2, maps[1])):
        flat = found.flatten(2).transpose(1, 2)
        for b in range(2):
            groups = trace.layer_dest[layer][b, tower.prefix :]
            for g in groups.unique():
                members = flat[b, groups == g]
                assert torch.equal(members, members[:1].expand_as(members))
            assert len(torch.unique(flat[b], dim=0)) == trace.tokens[layer + 1] - tower.prefix


@pytest.mark.parametrize("name", ["dinov3", "aimv2", "pixtral", "videomae"])
def test_one_graph_serves_all_layers(name: str) -> None:
    _, model, x = made(name)
    vtoken.apply(model, PITOME)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        vtoken.compile(model, backend="eager")
        assert_close("compiled blocks", expected, model(x).last_hidden_state, 1e-5)
        assert model(x[:1]).last_hidden_state.shape[1] == expected.shape[1]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("radio", {"pixel_values": torch.zeros(128, 48), "image_grid_hw": torch.tensor([[8, 8], [8, 8]])}),
        ("videomae", {"pixel_values": torch.zeros(2, 8, 3, 32, 32), "bool_masked_pos": torch.arange(64).gt(31) > 0}),
    ],
)
def test_calls_that_name_rows_are_refused_while_tokens_are_removed(name: str, inputs: dict[str, Tensor]) -> None:
    _, model, _ = made(name)
    if "bool_masked_pos" in inputs:
        inputs = inputs | {"bool_masked_pos": inputs["bool_masked_pos"].expand(2, -1)}
    with torch.no_grad():
        stock = model(**inputs).last_hidden_state
        with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
            assert torch.equal(model(**inputs).last_hidden_state, stock)
        vtoken.apply(model, PITOME)
        with pytest.raises(vtoken.InputError, match=[*inputs][1]):
            model(**inputs)


def test_all_that_radio_hands_out_is_of_the_same_rows() -> None:
    _, model, x = made("radio")
    vtoken.apply(model, vtoken.PiToMe(ratio=0.75, order="raster"))
    with torch.no_grad():
        out, trace = vtoken.trace(model, x)
    assert torch.equal(out.features, out.last_hidden_state[:, 10:])
    assert torch.equal(out.summary, out.last_hidden_state[:, :2].flatten(1))
    firsts = trace.anchor[:, 10:]
    assert torch.equal(firsts, firsts.sort(1).values), "rows in raster order"


def test_packed_images_come_one_at_a_time_while_tokens_are_removed() -> None:
    _, model, x = made("pixtral")
    two = torch.cat([x, x.flip(-1)])
    with torch.no_grad():
        stock = model(two).last_hidden_state
        with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
            assert torch.equal(model(two).last_hidden_state, stock), "the mask that keeps them apart stays"
        vtoken.apply(model, PITOME)
        with pytest.raises(vtoken.InputError, match="one image at a time"):
            model(two)
        framed = torch.nn.functional.pad(x, (0, 8, 0, 4))
        out, trace = vtoken.trace(model, framed, image_sizes=torch.tensor([[32, 32]]))
        assert trace.grid == (8, 8)
        assert torch.equal(out.last_hidden_state, model(x).last_hidden_state)
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 60,
    }
    holder = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=model.config.to_dict(), text_config=text))
    with pytest.raises(vtoken.UnsupportedModelError, match="by the sizes of the images"):
        vtoken.apply(holder, PITOME)


@pytest.mark.parametrize("name", ["vivit", "vitpose"])
def test_class_attention_is_not_read_where_it_is_not_understood(name: str) -> None:
    _, model, _ = made(name)
    with pytest.raises(vtoken.VTokenError, match="videos" if name == "vivit" else "no class token"):
        vtoken.cls_attention_scores(model, torch.zeros(1, 3, 32, 32))


def test_heads_of_video_models_that_read_the_first_tube_are_refused() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    model = hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**small, use_mean_pooling=False))
    with pytest.raises(vtoken.UnsupportedModelError, match=r"first tube.*use_mean_pooling=True"):
        vtoken.apply(model, PITOME)
    with pytest.raises(vtoken.UnsupportedModelError, match="4 experts"):
        vtoken.apply(hf.VitPoseBackbone(hf.VitPoseBackboneConfig(num_hidden_layers=1, num_experts=4)), PITOME)


_VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4, "image_size": 32}
_LANGUAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def _git() -> Any:
    text = _LANGUAGE | {"vocab_size": 60, "max_position_embeddings": 32}
    return hf.GitForCausalLM(hf.GitConfig(vision_config=_VISION | {"intermediate_size": 32}, **text))


def _janus() -> Any:
    codes = {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1],
             "num_res_blocks": 1, "latent_channels": 8, "projection_dim": 32}  # fmt: skip
    vision = _VISION | {"num_image_tokens": 64, "projection_dim": 32}
    text = _LANGUAGE | {"model_type": "llama", "vocab_size": 60}
    return hf.JanusForConditionalGeneration(
        hf.JanusConfig(vision_config=vision, text_config=text, vq_config=codes, image_token_id=50)
    )


@pytest.mark.parametrize(("build", "prefix", "asks"), [(_git, 1, False), (_janus, 0, True)])
def test_language_models_that_read_any_number_of_image_tokens(build: Any, prefix: int, asks: bool) -> None:
    model, x = randomise_(build(), 0).eval(), images((3, 32, 32), 2, 0, torch.float32)

    def logits(tokens: int) -> Tensor:
        ids = torch.tensor([[5, 6], [7, 8]])
        if asks:
            ids = torch.cat([torch.full((2, tokens), 50), ids], dim=1)
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=x).logits  # type: ignore[no-any-return]

    stock = logits(64)
    with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
        assert torch.equal(logits(64), stock)
    with vtoken.applied(model, PITOME):
        left = vtoken.num_tokens(model)
        assert left == prefix + 27
        assert logits(left).shape[1] == stock.shape[1] - (64 + prefix - left)
    assert torch.equal(logits(64), stock)


def test_a_pooler_that_reads_the_first_patch_is_refused() -> None:
    config = hf.IJepaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"first patch.*add_pooling_layer=False"):
        vtoken.apply(hf.IJepaModel(config, add_pooling_layer=True), PITOME)


def test_two_towers_of_any_family() -> None:
    """The image tower of a VisionTextDualEncoderModel may be any that is known, and is refused where it is not."""
    text = hf.BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}

    def made(vision: Any) -> Any:
        config = hf.VisionTextDualEncoderConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
        return randomise_(hf.VisionTextDualEncoderModel(config), 0).eval()

    model, x = made(hf.ViTConfig(**small, intermediate_size=32)), images((3, 32, 32), 2, 0, torch.float32)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        stock = model(input_ids=ids, pixel_values=x)
        with vtoken.applied(model, PITOME):
            reduced = model(input_ids=ids, pixel_values=x)
            assert vtoken.num_tokens(model) == vtoken.plan(model).tokens[-1] == 37
        assert torch.equal(stock.text_embeds, reduced.text_embeds)
        assert float((stock.image_embeds - reduced.image_embeds).abs().max()) > 1e-3
        assert torch.equal(model(input_ids=ids, pixel_values=x).logits_per_image, stock.logits_per_image)
    swin = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"its image tower is a SwinModel; .*windows"):
        vtoken.apply(made(swin), PITOME)


def _wrapper(cls: str, name: str, **model_args: Any) -> Any:
    config = hf.TimmWrapperConfig(architecture=name, num_labels=7, model_args=model_args, do_pooling=True)
    return randomise_(getattr(hf, cls)(config), 0).eval()


@pytest.mark.parametrize("cls", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_timm_model_behind_its_door(cls: str, pool: str) -> None:
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
    model = _wrapper(cls, "vit_tiny_patch16_224", **small, global_pool=pool, class_token=True)
    x = images((3, 32, 32), 2, 0, torch.float32)
    result = "logits" if cls.endswith("Classification") else "pooler_output"
    with torch.no_grad():
        stock = model(x)
        with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
            assert torch.equal(model(x)[result], stock[result])
        vtoken.apply(model, PITOME)
        out, trace = vtoken.trace(model, x)
        assert_planned(vtoken.plan(model), trace)
        assert trace.tokens == [65, 49, 37, 28]
        # By the timm model itself, which weighs by sizes.
        inner = model.timm_model(x) if result == "logits" else model.timm_model.forward_head(
            model.timm_model.forward_features(x))  # fmt: skip
        assert torch.equal(out[result], inner)
        assert not torch.allclose(out[result], stock[result], rtol=1e-3, atol=1e-3)
        with counted() as counter:
            model(x[:1])
        cost, spec = vtoken.report(model), find_adapter(model).spec(model)
        averaging = sum(2 * (a - b) * (b - 1) * spec.width for a, b in zip(cost.tokens, cost.tokens[1:], strict=False))
        assert 0.99 * counter.get_total_flops() <= cost.flops_after <= 1.01 * counter.get_total_flops() + averaging
        vtoken.remove(model)
        assert torch.equal(model(x)[result], stock[result])
        with vtoken.applied(model, vtoken.Sparsifiner(keep_ratio=1.0)):
            assert torch.equal(model(x)[result], stock[result])


def test_a_timm_model_that_keeps_a_grid_is_refused_behind_its_door_too() -> None:
    with pytest.raises(vtoken.UnsupportedModelError, match="plain-attention"):
        vtoken.apply(_wrapper("TimmWrapperModel", "resnet18"), PITOME)


@pytest.mark.parametrize("name", ["dinov3", "tipsv2", "pixio", "metaclip_2", "radio", "clipseg"])
def test_class_attention_is_that_of_the_hosts_own_maps(name: str) -> None:
    tower, model, x = made(name, torch.float64)
    if hasattr(attention(blocks(model)[0]), "attention"):
        pytest.skip("an attention that holds another one is refused")
    found = vtoken.cls_attention_scores(model, x, start_layer=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(x, output_attentions=True).attentions)  # [L, B, H, T, T]
    assert_close("scores", maps[:, :, :, 0, tower.prefix :].mean((0, 2)), found.double(), 1e-5)


def test_what_is_not_where_it_was_is_refused() -> None:
    _, model, _ = made("dinov3")
    del model.model.layer
    with pytest.raises(vtoken.UnsupportedModelError, match=r"no layers in model\.layer"):
        vtoken.apply(model, PITOME)
