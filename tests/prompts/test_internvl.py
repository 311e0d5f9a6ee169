"""Images of InternVL: tiles of one run, class attention, logits and ids as those of hand-fed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts import llavas  # noqa: E402

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [llavas.IMAGE]}
TILE = 9


def build(**options: Any) -> Any:
    t = transformers
    vision = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
        "image_size": [24, 24], "patch_size": [4, 4],
    }  # fmt: skip
    config = t.InternVLConfig(
        vision_config=vision, text_config=t.Qwen2Config(**llavas.TEXT), image_token_id=llavas.IMAGE, **options
    )
    return llavas.lively(t.InternVLForConditionalGeneration(config))


def call(pad: str = "left") -> dict[str, Tensor]:
    """An image of three tiles and one of one; an image of one tile. Two images touch text only."""
    rng = torch.Generator().manual_seed(2)
    given = llavas.prompt([1, -3 * TILE, 5, -TILE, 7, 8], [1, 6, -TILE, 9], pad=pad)
    return given | {"pixel_values": torch.randn(5, 3, 24, 24, generator=rng)}


def features(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    rows = model.model.get_image_features(given["pixel_values"], return_dict=True).pooler_output
    return list(rows.flatten(0, 1).split([3 * TILE, TILE, TILE]))


@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_keeping_all_changes_no_bit(pad: str) -> None:
    model, given = build(), call(pad)
    stock = model(**given).logits
    other = model(**given | {"pixel_values": given["pixel_values"].flip(0)}).logits
    assert float((other - stock).abs().max()) > 0.3
    ids = model.generate(**given, **GREEDY)
    for config in (vtoken.VTCCLS(keep_ratio=1.0), vtoken.VisionZip(keep_ratio=1.0)):
        with vtoken.applied(model, config):
            assert torch.equal(vtoken.trace(model, **given)[0].logits, stock)
            if config.method == "vtc_cls":
                assert torch.equal(model(**given).logits, stock)
                assert torch.equal(model.generate(**given, **GREEDY), ids)
    assert torch.equal(model(**given).logits, stock)


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_class_attention_by_eager_maps(layer: int) -> None:
    model, given = build(vision_feature_layer=layer), call()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=4, start_layer=1))
    scores = vtoken.trace(model, **given)[1].prompt.scores
    vtoken.remove(model)
    model.model.vision_tower.set_attn_implementation("eager")
    maps = model.model.vision_tower(given["pixel_values"], output_attentions=True).attentions
    last = 3 if layer == -1 else 2
    mean = torch.stack([m.mean(1)[:, 0, 1:] for m in maps[1 : last + 1]]).mean(0)
    tiles = [
        [mean[t].view(6, 6)[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean() for r in range(3) for c in range(3)]
        for t in range(5)
    ]
    assert_close("scores", torch.tensor(tiles).flatten(), torch.cat(list(scores)), 1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize(
    "config",
    [vtoken.VTCCLS(num_tokens=4), vtoken.DivPrune(num_tokens=3, space="before"), vtoken.CDPruner(keep_ratio=0.3)],
    ids=str,
)
@torch.no_grad()
def test_pruned_is_hand_fed(config: Any, pad: str) -> None:
    model, given = build(), call(pad)
    rows = features(model, given)
    vtoken.apply(model, config)
    out, trace = vtoken.trace(model, **given)
    u = config.num_tokens or 3
    assert trace.prompt.lengths == (3 * u, u, u)
    assert [len(v.cells) for v in trace.prompt.visuals] == [3, 1, 1]
    ids = model.generate(**given, **GREEDY) if pad == "left" else None
    kept = [k.tolist() for k in trace.prompt.kept]
    vtoken.remove(model)
    fed = llavas.by_hand(model, given, rows, kept, side=pad)
    seen = trace.prompt.index >= 0
    assert_close("logits", model(**fed).logits[seen], out.logits[seen], 1e-5)
    if ids is not None:
        assert torch.equal(ids[:, -4:], model.generate(**fed, **GREEDY)[:, -4:])


@torch.no_grad()
def test_beams_with_unequal_counts_are_the_rows_alone() -> None:
    model, given = build(), call()
    vtoken.apply(model, vtoken.DivPrune(num_tokens=4))
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    with vtoken.budget(model, num_tokens=[2, 7, 5]):
        together, static = model.generate(**given, **beams), model.generate(
            **given, **GREEDY, cache_implementation="static"
        )  # fmt: skip
        greedy = model.generate(**given, **GREEDY)
        assert torch.equal(static, greedy)
        assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), greedy)
    first = llavas.prompt([1, -3 * TILE, 5, -TILE, 7, 8]) | {"pixel_values": given["pixel_values"][:4]}
    second = llavas.prompt([1, 6, -TILE, 9]) | {"pixel_values": given["pixel_values"][4:]}
    for row, (alone, counts) in enumerate(((first, [2, 7]), (second, [5]))):
        with vtoken.budget(model, num_tokens=counts):
            assert torch.equal(model.generate(**alone, **beams)[:, -4:], together[2 * row : 2 * row + 2, -4:])


@torch.no_grad()
def test_merged_rows_original_positions_and_short_prompts() -> None:
    model, given = build(), call()
    vtoken.apply(model, vtoken.VisionZip(num_tokens=5, positions="original"))
    out, trace = vtoken.trace(model, **given)
    assert trace.prompt.lengths == (15, 5, 5)
    short = {"input_ids": trace.prompt.input_ids, "attention_mask": (trace.prompt.index >= 0).long()}
    vtoken.configure(model, positions="compact")
    assert_close("compact", model(**given).logits, model(**short, pixel_values=given["pixel_values"]).logits, 1e-6)
    assert model.generate(**given, **GREEDY, num_beams=2).shape[1] == given["input_ids"].shape[1] + 4
    with pytest.raises(vtoken.ShapeError, match="13 image placeholders"):
        model(**llavas.prompt([1, -13, 5]), pixel_values=given["pixel_values"][:2])
    assert vtoken.num_tokens(model) == 5
    assert out.logits.shape[1] == 3 + 15 + 5 + 1


def test_what_is_refused_and_what_it_costs() -> None:
    model = build(vision_feature_select_strategy="full")
    with pytest.raises(vtoken.ConfigError, match="class token"):
        vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    report = vtoken.prompt_report(build(), vtoken.VTCCLS(num_tokens=3), text_tokens=10)
    assert (report.before.image_tokens, report.after.image_tokens) == (9, 3)
    assert report.before.tower_macs < report.after.tower_macs < 1.05 * report.before.tower_macs
