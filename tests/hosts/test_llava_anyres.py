"""VTC-CLS on models that cut an image into crops: packing, newlines, lengths, interpolation.

Source: docs/methods/vtc_cls.md 8, 13.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import ANYRES, PATCHES, build, by_hand, features_of, plain_scores, plain_top, prompt  # noqa: E402
from vtoken.hosts.llava.adapter import LlavaAdapter  # noqa: E402

# (height, width) -> crops that the processor makes with the tiny pinpoints, the overview included.
SIZES = [(24, 24), (30, 40), (40, 30), (70, 28), (28, 70), (48, 48), (6, 60), (1, 900), (60, 6)]


def crops_of(model: Any, sizes: list[tuple[int, int]], *, single: bool = False) -> dict[str, Tensor]:
    """Random crops, padded with zeros to one number of them, and the sizes."""
    adapter = LlavaAdapter()
    counts = [1 if single else adapter.count(model, (), size).crops for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, 24, 24)
    rng = torch.Generator().manual_seed(3)
    for i, count in enumerate(counts):
        pixels[i, :count] = torch.randn(count, 3, 24, 24, generator=rng)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def prompts_for(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    features = features_of(model, **inputs, **options)
    return prompt(*[[1, -len(f), 5, 6] for f in features], pad="left"), features


@pytest.mark.parametrize("kind", ANYRES)
@pytest.mark.parametrize("newline", ["row", "all", "none"])
def test_kept_tokens_and_logits(kind: str, newline: str) -> None:
    model, sizes = build(kind), SIZES
    inputs = crops_of(model, sizes)
    with torch.no_grad():
        given, features = prompts_for(model, inputs)
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=5, newline=newline))
        out, trace = vtoken.trace(model, **given, **inputs)
        record = trace.prompt
        assert record is not None
        vtoken.remove(model)
        kept = []
        for i, size in enumerate(sizes):
            where = _layout(features[i], model)
            counts = LlavaAdapter().count(model, (vtoken.VTCCLS(num_tokens=5, newline=newline),), size)
            assert counts.full == len(features[i]) == record.full_lengths[i] == len(record.scores[i])
            assert counts.kept >= record.lengths[i]
            assert counts.kept == record.lengths[i] or not counts.exact
            kept.append(_expected(record.scores[i], where, newline))
            assert record.kept[i].tolist() == kept[-1], f"image of {size}"
            assert torch.equal(record.scores[i] < 0, where), "newlines are where the model puts them"
            assert trace.kept(i).tolist() == [j for j in kept[-1] if j < PATCHES]
        reference = model(**by_hand(model, given, features, kept, side="left"))
        other = model(**by_hand(model, given, features, [[*range(len(k))] for k in kept], side="left"))
    real = torch.zeros(reference.logits.shape[:2], dtype=torch.bool)
    real[:, -3:] = True
    assert_close("logits", reference.logits[real], out.logits[real], 1e-5)
    assert float((other.logits[real] - reference.logits[real]).abs().max()) > 1e-3, "the choice was to matter"


def _layout(features: Tensor, model: Any) -> Tensor:
    """Which features are the model's newline vector."""
    return (features == model.model.image_newline).all(1)


def _expected(scores: Tensor, newline: Tensor, rule: str) -> list[int]:
    """The rule written out: overview, detail, then newlines row by row."""
    found = plain_top(scores[:PATCHES], 5)
    detail = [i for i in range(PATCHES, len(scores)) if not newline[i]]
    best = [detail[i] for i in plain_top(scores[detail], math.ceil(len(detail) * 5 / PATCHES - 1e-6))] if detail else []
    lines, row = [], []
    for i in range(PATCHES, len(scores)):
        row.append(i)
        if newline[i]:
            if rule == "all" or (rule == "row" and any(j in best for j in row)):
                lines.append(i)
            row = []
    return sorted(found + best + lines)


@pytest.mark.parametrize("kind", ANYRES)
def test_scores_of_the_overview_and_of_the_grid(kind: str) -> None:
    """A 2 x 2 grid without padding: packed scores are the crops' scores, laid out by hand."""
    model = build(kind)
    inputs = crops_of(model, [(48, 48)])
    with torch.no_grad():
        given, _ = prompts_for(model, inputs)
        if kind == "next":
            rows = plain_scores(model, inputs["pixel_values"][0], 2, 2)
        else:
            model.model.vision_tower.set_attn_implementation("eager")
            maps = model.model.vision_tower(inputs["pixel_values"][0], output_attentions=True).attentions
            rows = maps[-1].mean((1, 2))
            model.model.vision_tower.set_attn_implementation("sdpa")
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=5))
        scores = vtoken.trace(model, **given, **inputs)[1].prompt.scores[0]
    grid = rows[1:].view(2, 2, 6, 6).permute(0, 2, 1, 3).reshape(12, 12)
    packed = torch.cat([rows[0], torch.cat([grid, -torch.ones(12, 1)], 1).flatten()])
    assert_close("packed", packed, scores, 1e-5)


@pytest.mark.parametrize("kind", ANYRES)
def test_whole_budget_changes_nothing(kind: str) -> None:
    model, sizes = build(kind), SIZES[:3]
    inputs = crops_of(model, sizes)
    with torch.no_grad():
        given, _ = prompts_for(model, inputs)
        stock = model(**given, **inputs).logits
        ids = model.generate(**given, **inputs, max_new_tokens=4, do_sample=False)
        for newline in ("row", "none"):
            with vtoken.applied(model, vtoken.VTCCLS(keep_ratio=1.0, newline=newline)):
                assert torch.equal(model(**given, **inputs).logits, stock)
                assert torch.equal(model.generate(**given, **inputs, max_new_tokens=4, do_sample=False), ids)
        assert torch.equal(model(**given, **inputs).logits, stock)


@pytest.mark.parametrize("kind", ANYRES)
def test_generate_equals_hand_fed(kind: str) -> None:
    model, sizes = build(kind), [(30, 40), (28, 70)]
    inputs = crops_of(model, sizes)
    with torch.no_grad():
        given, features = prompts_for(model, inputs)
        stock = model.generate(**given, **inputs, max_new_tokens=5, do_sample=False)[:, -5:]
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=4))
        with vtoken.tracing(model) as record:
            ids = model.generate(**given, **inputs, max_new_tokens=5, do_sample=False)
        beams = model.generate(**given, **inputs, max_new_tokens=5, do_sample=False, num_beams=3)
        vtoken.remove(model)
        assert record.prompt is not None
        fed = by_hand(model, given, features, [k.tolist() for k in record.prompt.kept], side="left")
        reference = model.generate(**fed, max_new_tokens=5, do_sample=False)
        with_beams = model.generate(**fed, max_new_tokens=5, do_sample=False, num_beams=3)
    assert torch.equal(ids[:, :-5], given["input_ids"])
    assert torch.equal(ids[:, -5:], reference[:, -5:])
    assert torch.equal(beams[:, -5:], with_beams[:, -5:])
    assert not torch.equal(reference[:, -5:], stock)


def test_interpolated_branch_of_onevision() -> None:
    """A 6 x 6 grid is shrunk bilinearly: scores go the same way, so there is one for every packed token."""
    model = build("onevision", image_grid_pinpoints=[[144, 144]])
    inputs = crops_of(model, [(144, 144)])
    with torch.no_grad():
        given, features = prompts_for(model, inputs)
        assert 9 * PATCHES < len(features[0]) < 36 * PATCHES / 2, "the grid was to be shrunk"
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=9))
        out, trace = vtoken.trace(model, **given, **inputs)
        record = trace.prompt
        vtoken.remove(model)
        reference = model(**by_hand(model, given, features, [record.kept[0].tolist()], side="left")).logits
    assert len(record.scores[0]) == len(features[0])
    assert torch.equal(record.scores[0] < 0, _layout(features[0], model))
    assert record.kept[0].tolist()[:9] == plain_top(record.scores[0][:PATCHES], 9)
    assert_close("logits", reference, out.logits, 1e-5)


def test_several_images_of_one_onevision_sample() -> None:
    """One crop each, N patches and a newline."""
    model = build("onevision")
    inputs = crops_of(model, [(24, 24), (24, 24), (48, 48)], single=True)
    options = {"batch_num_images": torch.tensor([3])}
    with torch.no_grad():
        features = features_of(model, **inputs, **options)
        assert [len(f) for f in features] == [PATCHES + 1] * 3
        given = prompt([1, -37, 5, -37, -37, 6])
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=4))
        out, trace = vtoken.trace(model, **given, **inputs, **options)
        record = trace.prompt
        vtoken.remove(model)
        kept = [k.tolist() for k in record.kept]
        assert kept == [[*plain_top(s[:PATCHES], 4), PATCHES] for s in record.scores]
        reference = model(**by_hand(model, given, features, kept)).logits
    assert_close("logits", reference, out.logits, 1e-5)


def real_sizes(kind: str) -> Any:
    """The real geometry with a tiny tower and language model, on the meta device."""
    t = transformers
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = t.LlamaConfig(**small, vocab_size=60, num_key_value_heads=2)
    with torch.device("meta"):
        if kind == "next":
            vision = t.CLIPVisionConfig(**small, image_size=336, patch_size=14)
            pins = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
            config = t.LlavaNextConfig(
                vision_config=vision, text_config=text, image_grid_pinpoints=pins, image_token_id=59
            )
            return t.LlavaNextForConditionalGeneration(config)
        vision = t.SiglipVisionConfig(**small, image_size=384, patch_size=14)
        pins = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]
        config = t.LlavaOnevisionConfig(
            vision_config=vision, text_config=text, image_grid_pinpoints=pins, image_token_id=59, video_token_id=58,
            vision_aspect_ratio="anyres_max_9",
        )  # fmt: skip
        return t.LlavaOnevisionForConditionalGeneration(config)


LENGTHS = {
    "next": {(336, 336): (1176, 24), (480, 640): (2340, 36), (640, 480): (2352, 48), (1000, 400): (2076, 60),
             (400, 1000): (2040, 24), (672, 672): (2928, 48), (90, 800): (1160, 8), (800, 90): (1224, 72),
             (1, 1000): (576, 0)},
    "onevision": {(384, 384): (1485, 27), (480, 640): (2929, 40), (1000, 400): (3402, 81), (1080, 1920): (7269, 60),
                  (2304, 2304): (7371, 81)},
}  # fmt: skip


@pytest.mark.parametrize("kind", ANYRES)
def test_packed_lengths_of_the_specification(kind: str) -> None:
    """docs/methods/vtc_cls.md 13."""
    model = real_sizes(kind)
    for size, (length, newlines) in LENGTHS[kind].items():
        full = LlavaAdapter().count(model, (), size)
        none = LlavaAdapter().count(model, (vtoken.VTCCLS(keep_ratio=0.999999, newline="none"),), size)
        assert full.full == full.kept == length, size
        every = vtoken.num_tokens(model, vtoken.VTCCLS(keep_ratio=0.5, newline="all"), img_size=size)
        bare = vtoken.num_tokens(model, vtoken.VTCCLS(keep_ratio=0.5, newline="none"), img_size=size)
        assert every - bare == newlines, size
        assert none.exact
        budget, detail = math.ceil(full.rows / 2), length - newlines - full.rows
        assert bare == budget + math.ceil(detail * budget / full.rows - 1e-6)
