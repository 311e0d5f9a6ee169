"""transformers towers against a slow model: explicit softmax, plain loops, one image at a time.

Source: docs/methods/pitome.md.

Weights and embeddings come from the model, the merge from tests/contract/slow_model.py, nothing from vtoken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.contract.slow_model import Settings, Tokens, merge
from tests.helpers import Host, assert_close

hf = pytest.importorskip("transformers")

_SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 24, "patch_size": 4,
}  # fmt: skip
_PLAIN = _SIZE | {"intermediate_size": 64}
_DINO = _SIZE | {"mlp_ratio": 2, "num_labels": 10}


@dataclass(frozen=True)
class Parts:
    """The parts of one layer, whatever its library names are."""

    norm1: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    attn: Any
    out: Callable[[Tensor], Tensor]
    scale1: Tensor | float = 1.0
    scale2: Tensor | float = 1.0
    mlp: Callable[[Tensor], Tensor] | None = None


def clip_parts(layer: Any) -> Parts:
    return Parts(layer.layer_norm1, layer.layer_norm2, layer.self_attn, layer.self_attn.out_proj)


def vit_parts(layer: Any) -> Parts:
    return Parts(layer.layernorm_before, layer.layernorm_after, layer.attention, layer.attention.o_proj)


def dino_parts(layer: Any) -> Parts:
    scales, attn = (layer.layer_scale1.lambda1, layer.layer_scale2.lambda1), layer.attention
    if hasattr(attn, "o_proj"):
        return Parts(layer.norm1, layer.norm2, attn, attn.o_proj, *scales)
    own = attn.attention  # transformers before 5.19 nests it and has other names
    named = SimpleNamespace(q_proj=own.query, k_proj=own.key, v_proj=own.value)
    return Parts(layer.norm1, layer.norm2, named, attn.output.dense, *scales)


def aimv2_parts(layer: Any) -> Parts:
    return Parts(layer.rms_norm1, layer.rms_norm2, layer.attention, layer.attention.out_proj, mlp=layer.ffn)


def rotated(rows: list[Tensor], t: Tokens, table: tuple[Tensor, Tensor], prefix: int) -> list[Tensor]:
    """Heads whose patches are turned by the table row of the patch that a token keeps the place of."""
    heads = []
    for head in rows:
        turned = []
        for i, row in enumerate(head):
            if i < prefix:
                turned.append(row)
                continue
            cos, sin = (part[t.anchor[i] - prefix] for part in table)
            half = len(row) // 2
            turned.append(row * cos + torch.cat([-row[half:], row[:half]]) * sin)
        heads.append(torch.stack(turned))
    return heads


def attend(q: Tensor, k: Tensor, v: Tensor, size: list[float] | None) -> Tensor:
    """One head: softmax(q k^T / sqrt(d) + log size) v."""
    rows = []
    for one in q:
        logits = torch.stack([one @ key for key in k]) / math.sqrt(k.shape[1])
        if size is not None:
            logits = logits + torch.tensor([math.log(n) for n in size], dtype=logits.dtype)
        weight = logits.exp() / logits.exp().sum()
        rows.append(sum(w * value for w, value in zip(weight, v, strict=True)))
    return torch.stack(rows)


def heads_of(x: Tensor) -> list[Tensor]:
    return list(x.split(x.shape[1] // _SIZE["num_attention_heads"], dim=1))


def run_layer(
    layer: Any, p: Parts, t: Tokens, index: int, s: Settings, prefix: int, table: tuple[Tensor, Tensor] | None
) -> Tokens:
    """Attention, merge, MLP; or attention, MLP, merge."""
    mlp = p.mlp or layer.mlp
    normed = p.norm1(t.x)
    q, k, v = (heads_of(part(normed)) for part in (p.attn.q_proj, p.attn.k_proj, p.attn.v_proj))
    size = t.size if s.prop_attn and t.merged else None
    turned = (q, k) if table is None else (rotated(q, t, table, prefix), rotated(k, t, table, prefix))
    out = torch.cat([attend(*head, size) for head in zip(*turned, v, strict=True)], 1)
    t.x = t.x + p.scale1 * p.out(out)
    if s.place == "after":
        t.x = t.x + p.scale2 * mlp(p.norm2(t.x))
    metric = sum(k) / len(k) if s.metric == "key" else t.x
    t = merge(t, metric, index, _SIZE["num_hidden_layers"], s, prefix)
    if s.place == "between":
        t.x = t.x + p.scale2 * mlp(p.norm2(t.x))
    return t


def weighted_mean(rows: Tensor, size: list[float]) -> Tensor:
    return sum(n * row for n, row in zip(size, rows, strict=True)) / sum(size)


def siglip_pool(head: Any, rows: Tensor, size: list[float]) -> Tensor:
    """SigLIP's probe attends to the rows, each counting as its patches."""
    attn = head.attention
    wq, wk, wv = attn.in_proj_weight.chunk(3)
    bq, bk, bv = attn.in_proj_bias.chunk(3)
    q, k, v = (heads_of(x @ w.T + b) for x, w, b in ((head.probe[0], wq, bq), (rows, wk, bk), (rows, wv, bv)))
    out = attn.out_proj(torch.cat([attend(*parts, size) for parts in zip(q, k, v, strict=True)], 1))[0]
    return out + head.mlp(head.layernorm(out))


@dataclass(frozen=True)
class Case:
    """How one model class embeds, what its layers are, and what it hands out of the rows that are left."""

    build: Callable[[], nn.Module]
    prefix: int
    tower: Callable[[Any], Any]
    layers: Callable[[Any], Any]
    parts: Callable[[Any], Parts]
    rows: Callable[[Any, Tensor], Tensor]
    result: str
    pool: Callable[[Any, Tensor, list[float]], Tensor]

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """What enters layer 0, [B, T, C]."""
        tower = self.tower(model)
        x = tower.embeddings(images)
        return tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x


def aimv2_pool(head: Any, rows: Tensor, size: list[float]) -> Tensor:
    """AIMv2's class token asks the rows, each counting as its patches."""
    parts = (heads_of(x) for x in (head.cls_token[0], head.k_proj(rows), head.v_proj(rows)))
    return head.output_proj(torch.cat([attend(*one, size) for one in zip(*parts, strict=True)], 1))[0]


def same(model: Any) -> Any:
    return model


def dino_logits(prefix: int) -> Callable[[Any, Tensor, list[float]], Tensor]:
    def pool(model: Any, rows: Tensor, size: list[float]) -> Tensor:
        return model.classifier(torch.cat([rows[0], weighted_mean(rows[prefix:], size[prefix:])]))

    return pool


CASES = {
    "vit": Case(
        lambda: hf.ViTModel(hf.ViTConfig(**_PLAIN)), 1, same, lambda m: m.layers, vit_parts,
        lambda m, x: m.layernorm(x), "pooler_output", lambda m, x, size: m.pooler.dense(x[0]).tanh(),
    ),
    "clip": Case(
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_PLAIN)), 1, same, lambda m: m.encoder.layers, clip_parts,
        lambda m, x: x, "pooler_output", lambda m, x, size: m.post_layernorm(x[0]),
    ),
    "siglip": Case(
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_PLAIN)), 0, same, lambda m: m.encoder.layers, clip_parts,
        lambda m, x: m.post_layernorm(x), "pooler_output", lambda m, x, size: siglip_pool(m.head, x, size),
    ),
    "dino": Case(
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_DINO)), 1, lambda m: m.dinov2,
        lambda m: m.dinov2.encoder.layer, dino_parts, lambda m, x: m.dinov2.layernorm(x), "logits", dino_logits(1),
    ),
    "dino_reg": Case(
        lambda: hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**_DINO)), 5,
        lambda m: m.dinov2_with_registers, lambda m: m.dinov2_with_registers.encoder.layer, dino_parts,
        lambda m, x: m.dinov2_with_registers.layernorm(x), "logits", dino_logits(5),
    ),
    "ijepa": Case(
        lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**_PLAIN, num_labels=10)), 0, lambda m: m.ijepa,
        lambda m: m.ijepa.layers, vit_parts, lambda m, x: m.ijepa.layernorm(x), "logits",
        lambda m, x, size: m.classifier(weighted_mean(x, size)),
    ),
    "pixio": Case(
        lambda: hf.PixioModel(hf.PixioConfig(**_SIZE, mlp_ratio=2, n_cls_tokens=3)), 3, same, lambda m: m.layers,
        vit_parts, lambda m, x: m.layernorm(x), "pooler_output", lambda m, x, size: x[:3].mean(0),
    ),
    "aimv2": Case(
        lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**_PLAIN)), 0, same, lambda m: m.encoder.layers, aimv2_parts,
        lambda m, x: m.rms_norm(x), "pooler_output", lambda m, x, size: aimv2_pool(m.head, x, size),
    ),
    "dinov3": Case(
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**_PLAIN, num_register_tokens=2)), 3, same,
        lambda m: m.model.layer, dino_parts, lambda m, x: m.norm(x), "pooler_output", lambda m, x, size: x[0],
    ),
}  # fmt: skip


def run_slowly(case: Case, model: Any, images: Tensor, s: Settings) -> tuple[list[Tensor], list[Tensor], list[Tokens]]:
    """Per image: the result, the rows in raster order, the tokens that are left."""
    results, found, left = [], [], []
    table = model.rope_embeddings(images) if hasattr(model, "rope_embeddings") else None
    for image in case.embed(model, images):
        count = len(image)
        t = Tokens(image, [1.0] * count, list(range(count)), [[i] for i in range(count)])
        for index, layer in enumerate(case.layers(model)):
            t = run_layer(layer, case.parts(layer), t, index, s, case.prefix, table)
        order = sorted(range(len(t.anchor)), key=t.anchor.__getitem__)
        rows = case.rows(model, t.x[order])
        results.append(case.pool(model, rows, [t.size[i] for i in order]))
        found.append(rows)
        left.append(t)
    return results, found, left


def check(name: str, method: str, **options: Any) -> None:
    """Result, rows, sizes and anchors agree."""
    case = CASES[name]
    host = Host(name, case.build, (3, 24, 24))
    model, x = host.model(dtype=torch.float64), host.images(dtype=torch.float64)
    config = {"pitome": vtoken.PiToMe, "tome": vtoken.ToMe}[method](ratio=0.75, **options)
    with torch.no_grad():
        results, rows, left = run_slowly(case, model, x, Settings(method=method, **options))
        vtoken.apply(model, config)
        out, trace = vtoken.trace(model, x)
        hidden = case.tower(model)(x).last_hidden_state
    assert trace.size is not None
    assert trace.anchor is not None
    assert trace.tokens[-1] < 0.5 * trace.tokens[0]
    for b, t in enumerate(left):
        order = sorted(range(len(t.anchor)), key=t.anchor.__getitem__)
        assert trace.anchor[b].tolist() == [t.anchor[i] for i in order]
        assert trace.size[b].tolist() == [t.size[i] for i in order]
        assert_close(f"rows of image {b}", rows[b], hidden[b], 1e-9)
        assert_close(f"{case.result} of image {b}", results[b], out[case.result][b], 1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_defaults(name: str, method: str) -> None:
    check(name, method)


@pytest.mark.parametrize("name", ["siglip", "dino_reg", "dinov3"])
@pytest.mark.parametrize("options", [{"metric": "hidden"}, {"place": "after"}, {"prop_attn": False}], ids=str)
def test_options(name: str, options: dict[str, Any]) -> None:
    check(name, "pitome", **options)
