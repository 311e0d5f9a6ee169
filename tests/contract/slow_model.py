"""A merged transformer written again, slowly, from docs/methods/pitome.md alone: plain loops, one image at a time.

It takes weights and embeddings from a timm model and nothing from vtoken. What it computes is compared with the patched
model in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Settings:
    """What to do, in the words of docs/methods/pitome.md."""

    method: str = "pitome"
    ratio: float | None = 0.75
    r: int | None = None
    margin: float = 0.9
    alpha: float = 1.0
    energy: str = "elu"
    variants: tuple[str, ...] = ()
    metric: str = "key"
    place: str = "between"
    prop_attn: bool = True
    reduction: str = "wavg"
    layers: tuple[int, ...] | None = None


@dataclass
class Tokens:
    """The tokens of one image: rows [T, C], patches per row, original position per row, members per row."""

    x: Tensor
    size: list[float]
    anchor: list[int]
    members: list[list[int]] = field(default_factory=list)
    merged: bool = False


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity; zero vectors are similar to nothing."""
    return float(a @ b) / (max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12))


def energies(rows: list[Tensor], margin: float, alpha: float, kind: str) -> list[float]:
    """Section 2, step 3, and 11.1: E_i = mean over all j of f(S_ij - m)."""
    found = []
    for a in rows:
        total = 0.0
        for b in rows:
            s = cosine(a, b)
            if kind == "eq4":
                total += s if s >= margin else alpha * (math.exp(s - margin) - 1.0)
            else:
                total += s - margin if s > margin else alpha * (math.exp(s - margin) - 1.0)
        found.append(total / len(rows))
    return found


def pairs_of(rows: list[Tensor], count: int, margin: float, s: Settings, variant: str, prefix: int) -> tuple[Any, Any]:
    """Which mergeable row goes into which: ({source: destination}, destinations in output order)."""
    if variant == "tome":
        a = [i for i in range(len(rows)) if (i + prefix) % 2 == 0]
        b = [i for i in range(len(rows)) if (i + prefix) % 2 == 1]
    else:
        energy = energies(rows, margin, s.alpha, s.energy)
        order = sorted(range(len(rows)), key=lambda i: -energy[i])  # stable: equal energies keep their index order
        chosen = order[: 2 * count] if variant == "pitome" else order
        a, b = chosen[0::2], chosen[1::2]
    best = {i: max(b, key=lambda j, i=i: cosine(rows[i], rows[j])) for i in a}  # first of equals
    if variant != "pitome":  # only the r best pairs merge
        a = sorted(a, key=lambda i: -cosine(rows[i], rows[best[i]]))[:count]
    return {i: best[i] for i in a}, b


def merge(t: Tokens, metric: Tensor, layer: int, depth: int, s: Settings, prefix: int) -> Tokens:
    """One merge: prefix rows, kept rows in index order, destinations."""
    n = len(t.size) - prefix
    wanted = s.r if s.r is not None else math.floor(n - n * (s.ratio or 1.0) + 1e-6)
    count = min(wanted, n // 2)
    if count < 1 or (s.layers is not None and layer not in s.layers):
        return t
    variant = s.variants[layer] if s.variants else s.method
    rows = [metric[prefix + i] for i in range(n)]
    goes, into = pairs_of(rows, count, s.margin * (1.0 - layer / depth), s, variant, prefix)
    kept = [i for i in range(n) if i not in goes and i not in into]
    out = Tokens(x=t.x, size=[], anchor=[], merged=s.reduction != "prune")
    new = []
    for i in [*range(-prefix, 0), *kept, *into]:
        own = prefix + i
        sources = [prefix + j for j in sorted(goes) if goes[j] == i] if i >= 0 else []
        group = [own, *sources]
        size = sum(t.size[g] for g in group)
        if s.reduction == "wavg":
            new.append(sum(t.size[g] * t.x[g] for g in group) / size)
        elif s.reduction == "mean":
            new.append(sum(t.x[g] for g in group) / len(group))
        elif s.reduction == "amax":
            new.append(torch.stack([t.x[g] for g in group]).amax(0))
        else:
            new.append(t.x[own])
            size = t.size[own]
        out.size.append(size)
        out.anchor.append(t.anchor[own])
        out.members.append([m for g in group for m in t.members[g]])
    out.x = torch.stack(new)
    return out


def rotate(row: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs (0, 1), (2, 3), ... by a table row [sin | cos]."""
    sin, cos = table.chunk(2)
    out = torch.empty_like(row)
    for c in range(0, len(row), 2):
        out[c] = row[c] * cos[c] - row[c + 1] * sin[c]
        out[c + 1] = row[c + 1] * cos[c + 1] + row[c] * sin[c + 1]
    return out


def attention(attn: Any, x: Tensor, t: Tokens, s: Settings, prefix: int, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention output [T, C] and keys before rotation [H, T, D], by explicit softmax with log sizes."""
    length, heads = x.shape[0], attn.num_heads
    if getattr(attn, "qkv", None) is not None:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = (x @ attn.qkv.weight.T + (0.0 if bias is None else bias)).reshape(length, 3, heads, -1).unbind(1)
    else:
        q, k, v = (part(x).reshape(length, heads, -1) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = attn.q_norm(q), attn.k_norm(k)
    keys, out = k.transpose(0, 1), []
    for h in range(heads):
        qh, kh = q[:, h].clone(), k[:, h].clone()
        for i in range(prefix, length if rope is not None else 0):
            table = rope[t.anchor[i] - prefix] if rope.dim() == 2 else rope[h, t.anchor[i] - prefix]
            qh[i], kh[i] = rotate(q[i, h], table), rotate(k[i, h], table)
        logits = qh @ kh.T / math.sqrt(qh.shape[1])
        if s.prop_attn and t.merged:
            logits = logits + torch.tensor([math.log(n) for n in t.size], dtype=logits.dtype)
        out.append(logits.softmax(-1) @ v[:, h])
    return attn.proj(attn.norm(torch.cat(out, 1))), keys


def run_slowly(model: Any, images: Tensor, s: Settings) -> tuple[Tensor, list[Tokens]]:
    """Logits, and what is left of every image's tokens, before the final norm."""
    x, rope = model.patch_embed(images), None
    x = model._pos_embed(x)
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    prefix, depth = model.num_prefix_tokens, len(model.blocks)
    logits, left = [], []
    for image in x:
        count = len(image)
        t = Tokens(image, [1.0] * count, list(range(count)), [[i] for i in range(count)])
        for layer, block in enumerate(model.blocks):
            turn = rope[layer] if rope is not None and getattr(model, "rope_mixed", False) else rope
            branch, keys = attention(block.attn, block.norm1(t.x), t, s, prefix, turn)
            t.x = t.x + (block.ls1(branch) if hasattr(block, "ls1") else scaled(block.gamma_1, branch))
            if s.place == "after":
                t.x = t.x + _mlp(block, t.x)
            metric = {"key": keys.mean(0), "key_concat": torch.cat(list(keys), 1), "hidden": t.x}[s.metric]
            t = merge(t, metric, layer, depth, s, prefix)
            if s.place == "between":
                t.x = t.x + _mlp(block, t.x)
        left.append(t)
        logits.append(model.head(pooled(model, model.norm(t.x), t.size)))
    return torch.stack(logits), left


def _mlp(block: Any, x: Tensor) -> Tensor:
    out = block.mlp(block.norm2(x))
    return block.ls2(out) if hasattr(block, "ls2") else scaled(block.gamma_2, out)


def scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    """Layer scale, if there is one."""
    return x if gamma is None else x * gamma


def pooled(model: Any, x: Tensor, size: list[float]) -> Tensor:
    """Class token, or the mean over patches: every row counts as its size."""
    if model.global_pool == "token":
        return model.fc_norm(x[0])
    rows = range(model.num_prefix_tokens, len(size))
    return model.fc_norm(sum(size[i] * x[i] for i in rows) / sum(size[i] for i in rows))
