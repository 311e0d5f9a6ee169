"""VTC-CLS on many random settings against a slow reference that shares nothing with the code or the other tests.

Scores come from eager attention maps, entry by entry; kept sets by sorting; logits, loss and greedy ids from a language
model that is fed the kept embeddings by hand.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken

transformers = pytest.importorskip("transformers")

IMAGE, PAD, WORDS, PATCHES, NEW = 7, 0, 50, 25, 4


@dataclass
class Case:
    """One random setting; `rows` are ids, None stands for an image."""

    seed: int
    depth: int = 4
    heads: int = 2
    layer: Any = -2
    strategy: str = "default"
    attention: str = "sdpa"
    start: int | None = None
    how: str = "mean"
    budget: dict[str, Any] = field(default_factory=dict)
    side: str = "right"
    masked: bool = True
    rows: list[list[int | None]] = field(default_factory=list)

    @property
    def last(self) -> int:
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        return max(v % (self.depth + 1) for v in layers) - 1

    @property
    def first(self) -> int:
        return min(math.ceil(2 * self.depth / 3), self.last) if self.start is None else self.start % self.depth

    @property
    def kept(self) -> int:
        share = self.budget.get("keep_ratio")
        wanted = self.budget["num_tokens"] if share is None else max(1, math.ceil(share * PATCHES - 1e-6))
        return int(min(wanted, PATCHES))


def case(seed: int) -> Case:
    rng = random.Random(seed)
    c = Case(seed, depth=rng.choice([3, 4, 5]), heads=rng.choice([2, 3]), attention=rng.choice(["sdpa", "eager"]))
    c.layer = rng.choice([-1, -2, -2, 1, 2, [-2, -1], [-3, -2], [1, 2]])
    c.strategy = "default" if isinstance(c.layer, list) else rng.choice(["default", "default", "full"])
    starts = list(range(c.last + 1))
    c.start = rng.choice([None, *starts, *(s - c.depth for s in starts)])
    c.how = rng.choice(["mean", "sum", "max", "min"])
    ratio = rng.choice([0.04, 0.1, 0.33, 0.5, 0.99, 1.0])
    c.budget = rng.choice([{"num_tokens": rng.choice([1, 2, 3, 7, 12, 24, 25, 40])}, {"keep_ratio": ratio}])
    for _ in range(rng.choice([1, 1, 2, 3])):
        row: list[int | None] = [rng.randrange(8, WORDS) for _ in range(rng.randint(1, 3))]
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            row += [None, *(rng.randrange(8, WORDS) for _ in range(rng.choice([0, 0, 2])))]
        c.rows.append(row + [rng.randrange(8, WORDS) for _ in range(rng.randint(0, 3))])
    if not any(token is None for row in c.rows for token in row):
        c.rows[-1].append(None)
    even = len({len(full(row, c)) for row in c.rows}) == 1
    c.side, c.masked = rng.choice(["left", "right"]), rng.random() < 0.5 or not even
    return c


def full(row: list[int | None], c: Case) -> list[int]:
    length = PATCHES + (c.strategy == "full")
    return [i for token in row for i in ([IMAGE] * length if token is None else [token])]


def padded(rows: list[list[Any]], filler: Any, side: str) -> list[list[Any]]:
    width = max(map(len, rows))
    return [[filler] * (width - len(r)) + r if side == "left" else r + [filler] * (width - len(r)) for r in rows]


def model_of(c: Case) -> Any:
    t = transformers
    vision = t.CLIPVisionConfig(hidden_size=8 * c.heads, intermediate_size=40, num_hidden_layers=c.depth,
                                num_attention_heads=c.heads, image_size=20, patch_size=4)  # fmt: skip
    text = t.LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                         num_key_value_heads=1, vocab_size=WORDS, eos_token_id=None, pad_token_id=PAD)  # fmt: skip
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=c.layer,
                           vision_feature_select_strategy=c.strategy)  # fmt: skip
    model, rng = t.LlavaForConditionalGeneration(config), torch.Generator().manual_seed(c.seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            loud = "projector" in name or ("vision" in name and ("q_proj" in name or "k_proj" in name))
            p.data = torch.randn(p.shape, generator=rng) * (1.8 if loud else 1.0) * p[0].numel() ** -0.5
    model.set_attn_implementation(c.attention)
    return model.eval()


def scores_by_entry(model: Any, pixels: Tensor, c: Case) -> list[list[float]]:
    """Of every image, every patch: from attention maps, one head and one layer at a time, in float64."""
    eager = copy.deepcopy(model.model.vision_tower)
    eager.set_attn_implementation("eager")
    maps = [m.tolist() for m in eager(pixels, output_attentions=True).attentions]
    combine = {"mean": lambda v: sum(v) / len(v), "sum": sum, "max": max, "min": min}[c.how]
    layers = range(c.first, c.last + 1)
    return [
        [combine([sum(head[0][j] for head in maps[layer][b]) / c.heads for layer in layers])
         for j in range(1, PATCHES + 1)]
        for b in range(len(pixels))
    ]  # fmt: skip


def best(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


def fed(model: Any, c: Case, features: list[Tensor], kept: list[list[int]], labels: list[list[int]], side: str) -> Any:
    """Embeddings, mask and labels with the kept features put in by hand."""
    table = model.get_input_embeddings().weight
    rows, marks, image = [], [], iter(range(len(kept)))
    for row, label in zip(c.rows, labels, strict=True):
        embeds, mark, place = [], [], 0
        for token in row:
            if token is None:
                i = next(image)
                embeds += [features[i][j] for j in kept[i]]
                mark += [label[place + j] for j in kept[i]]
                place += len(features[i])
            else:
                embeds.append(table[token])
                mark.append(label[place])
                place += 1
        rows.append(embeds)
        marks.append(mark)
    ones = [[1] * len(r) for r in rows]
    stacked = torch.stack([torch.stack(r) for r in padded(rows, table[PAD], side)])
    return stacked, torch.tensor(padded(ones, 0, side)), torch.tensor(padded(marks, -100, side))


def greedy(model: Any, embeds: Tensor, mask: Tensor) -> Tensor:
    """Token by token, without a cache."""
    new = []
    for _ in range(NEW):
        places = (mask.cumsum(1) - 1).clamp_min(0)
        new.append(model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits[:, -1].argmax(-1))
        embeds = torch.cat([embeds, model.get_input_embeddings()(new[-1])[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(new, 1)


@pytest.mark.parametrize("seed", range(32))
@torch.no_grad()
def test_against_the_slow_reference(seed: int) -> None:
    c = case(seed)
    model, rng = model_of(c), random.Random(seed)
    count = sum(token is None for row in c.rows for token in row)
    pixels = torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(seed))
    ids = [full(row, c) for row in c.rows]
    labels = [[-100 if i == IMAGE or rng.random() < 0.2 else i for i in row] for row in ids]
    scores = scores_by_entry(model, pixels, c)
    cut = [sorted(row, reverse=True)[c.kept - 1 : c.kept + 1] for row in scores]
    assert all(len(two) < 2 or two[0] - two[1] > 2e-7 for two in cut), "rounding was not to decide"
    extra = int(c.strategy == "full")
    kept = [[*range(extra), *(j + extra for j in best(row, c.kept))] for row in scores]
    features = list(model.model.get_image_features(pixel_values=pixels).pooler_output)
    embeds, mask, marks = fed(model, c, features, kept, labels, c.side)
    reference = model(inputs_embeds=embeds, attention_mask=mask, labels=marks)
    expected = greedy(model, *fed(model, c, features, kept, labels, "left")[:2])
    given = {"input_ids": torch.tensor(padded(ids, PAD, c.side)), "pixel_values": pixels}
    if c.masked:
        given["attention_mask"] = torch.tensor(padded([[1] * len(row) for row in ids], 0, c.side))
    stock = model(**given).logits
    vtoken.apply(model, vtoken.VTCCLS(**c.budget, start_layer=c.start, ensemble=c.how))
    out, trace = vtoken.trace(model, **given, labels=torch.tensor(padded(labels, -100, c.side)))
    assert trace.prompt is not None
    assert trace.prompt.layers == tuple(range(c.first, c.last + 1))
    for i, row in enumerate(scores):
        assert float((trace.prompt.scores[i][extra:].double() - torch.tensor(row).double()).abs().max()) < 1e-6
        assert trace.prompt.kept[i].tolist() == kept[i]
    real = mask == 1
    largest = reference.logits[real].abs().max()
    assert float((out.logits[real] - reference.logits[real]).abs().max() / largest) < 1e-5
    if bool((marks[:, 1:] != -100).any()):
        assert float(out.loss) == pytest.approx(float(reference.loss), rel=1e-5)
    assert torch.equal(out.logits, stock) == (c.kept == PATCHES)
    left = {"input_ids": torch.tensor(padded(ids, PAD, "left")), "pixel_values": pixels}
    left["attention_mask"] = torch.tensor(padded([[1] * len(row) for row in ids], 0, "left"))
    with vtoken.tracing(model) as record:
        new = model.generate(**left, max_new_tokens=NEW, do_sample=False)
    assert record.prompt is not None
    assert [k.tolist() for k in record.prompt.kept] == kept
    assert torch.equal(new[:, :-NEW], left["input_ids"])
    assert torch.equal(new[:, -NEW:], expected)


def test_the_settings_are_many() -> None:
    cases = [case(seed) for seed in range(32)]
    for name in ("depth", "layer", "strategy", "attention", "start", "how", "side", "masked", "kept"):
        assert len({str(getattr(c, name)) for c in cases}) > 1, name
    assert any(None not in row for c in cases for row in c.rows)
    assert any(a is None and b is None for c in cases for row in c.rows for a, b in itertools.pairwise(row))
    assert sum(c.kept < PATCHES for c in cases) > 16
