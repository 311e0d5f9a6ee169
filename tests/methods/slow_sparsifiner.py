"""Sparsifiner written again, slowly, from docs/methods/sparsifiner.md alone: plain loops, one image at a time.

It takes weights and embedded tokens from a model and nothing from vtoken but the order of the Hilbert curve (which has
tests of its own). What it computes is compared with the patched model in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.contract import slow_model
from tests.contract.table import attention
from vtoken.ops.sparse.hilbert import hilbert_order


@dataclass
class Case:
    """What to do, in the words of docs/methods/sparsifiner.md."""

    prefix: int
    grid: tuple[int, int]
    keep: Any = 0.3
    mode: str = "exact"
    group: int = 64
    layers: tuple[int, ...] | None = None
    coef_topk: int = 8
    coef_threshold: float = 0.0
    basis_threshold: float = 0.02
    basis_abs: bool = True
    scale: float | None = None
    token_keep: float = 1.0
    prune_after: tuple[int, ...] = ()
    recon: bool = False
    merging: slow_model.Settings | None = None
    #: Sines and cosines of every patch by block, [T, D] or [H, T, D], of models that rotate queries and keys.
    tables: list[tuple[Tensor, Tensor]] | None = None


@dataclass
class Layer:
    """What one attention did with one image."""

    live: list[int]
    mask: Tensor | None = None
    scores: Tensor | None = None
    attention: Tensor | None = None


@dataclass
class Result:
    """Rows [T', C] of one image behind the last block, where they came from, and its layers."""

    x: Tensor
    live: list[int]
    layers: list[Layer] = field(default_factory=list)


def best(values: list[float], count: int) -> list[int]:
    """Indices of the largest values, the first of equals, ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def counted(share: float, total: int) -> int:
    """ceil(share * total), where 0.1 * 30 is 3."""
    return max(1, math.ceil(round(share * total, 9)))


def coefficients(p: Any, q: Tensor, k: Tensor, live: list[int], case: Case, heads: int) -> list[list[Tensor]]:
    """Softmax over the basis of every patch query, [H][T] vectors of K numbers (section 2, steps 1 to 4)."""
    scale = heads**-0.5 if case.scale is None else case.scale
    found, num_basis = [], p.w_down.shape[1]
    for h in range(heads):
        reduced = [p.reduce_k.weight @ k[h, t] + p.reduce_k.bias for t in range(len(live))]
        mixed = [sum(p.w_down[token, j] * r for token, r in zip(live, reduced, strict=True)) for j in range(num_basis)]
        rows = []
        for i in range(case.prefix, len(live)):
            own = p.reduce_q.weight @ q[h, i] + p.reduce_q.bias
            rows.append(torch.stack([own @ m * scale for m in mixed]).softmax(0))
        found.append(rows)
    return found


def sparse(a: Tensor, count: int, least: float) -> list[float]:
    """Step 5: the largest coefficients, or all above a threshold, without renormalisation."""
    values = a.tolist()
    if count == 0:
        return [value if value > least else 0.0 for value in values]
    kept = best(values, count)
    return [value if j in kept else 0.0 for j, value in enumerate(values)]


def basis_of(p: Any, live: list[int], case: Case) -> list[list[float]]:
    """Step 6: [K, n]."""
    out = []
    for column in p.w_up.T.tolist():
        values = [abs(column[token]) if case.basis_abs else column[token] for token in live]
        out.append([value if value > case.basis_threshold else 0.0 for value in values])
    return out


def groups_of(live: list[int], case: Case) -> list[list[int]]:
    """Patch queries (0..T-1) in neighbourhoods."""
    place = {patch: i for i, patch in enumerate(hilbert_order(*case.grid).tolist())}
    order = sorted(range(len(live) - case.prefix), key=lambda i: place[live[case.prefix + i] - case.prefix])
    size = math.ceil(len(order) / math.ceil(len(order) / case.group))
    return [order[i : i + size] for i in range(0, len(order), size)]


def connections(p: Any, q: Tensor, k: Tensor, live: list[int], case: Case, layer: int, total: int) -> tuple[Any, Any]:
    """Mask [H, n, n] and scores [H, T, n] (sections 2, 3 and 8)."""
    heads, n, prefix = q.shape[0], len(live), case.prefix
    keep = case.keep[layer] if isinstance(case.keep, tuple) else case.keep
    budget = min(counted(keep, total), n)
    basis = basis_of(p, live, case)
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    mask[:, :prefix] = True
    scores = torch.zeros(heads, n - prefix, n, dtype=q.dtype)
    for h, rows in enumerate(coefficients(p, q, k, live, case, heads)):
        rows = [sparse(a, case.coef_topk, case.coef_threshold) for a in rows]
        scores[h] = torch.tensor([score_row(a, basis) for a in rows], dtype=q.dtype)
        for group in groups_of(live, case) if case.mode == "grouped" else [[i] for i in range(len(rows))]:
            own = score_row([sum(rows[i][j] for i in group) / len(group) for j in range(len(basis))], basis)
            limit = float(p.threshold[h])
            kept = [t for t in range(n) if own[t] > limit] if case.mode == "threshold" else best(own, budget)
            for i in group:
                mask[h, prefix + i, kept] = True
    return mask, scores


def score_row(a: list[float], basis: list[list[float]]) -> list[float]:
    """Step 7 for one query: [n]."""
    return [sum(a[j] * basis[j][t] for j in range(len(a))) for t in range(len(basis[0]))]


def softmax_over(logits: list[float], kept: list[bool]) -> list[float]:
    """Softmax of one row over some of its keys; zeros where there are none."""
    most = max((value for value, own in zip(logits, kept, strict=True) if own), default=0.0)
    shares = [math.exp(value - most) if own else 0.0 for value, own in zip(logits, kept, strict=True)]
    return [share / (sum(shares) or 1.0) for share in shares]


def projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [H, n, D] in front of norms and rotation, by the weights themselves."""
    n, width = x.shape[0], attn.head_dim
    if getattr(attn, "q_proj", None) is not None:  # keys and values may have fewer heads
        rows = []
        for part in (attn.q_proj, attn.k_proj, attn.v_proj):
            made = x @ part.weight.T + (0.0 if part.bias is None else part.bias)
            rows.append(made.reshape(n, -1, width).permute(1, 0, 2))
        return rows[0], rows[1], rows[2]
    if hasattr(attn, "in_proj_weight"):
        packed = x @ attn.in_proj_weight.T + attn.in_proj_bias
    else:
        packed = x @ attn.qkv.weight.T + (0.0 if attn.qkv.bias is None else attn.qkv.bias)
        if getattr(attn, "q_bias", None) is not None:
            packed = packed + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = packed.reshape(n, 3, -1, width).permute(1, 2, 0, 3)
    return q, k, v


def rotated(rows: Tensor, live: list[int], prefix: int, table: tuple[Tensor, Tensor], half: bool) -> Tensor:
    """Rows [H, n, D] turned by the angles of the places that they stand at, number by number; no prefix row turns."""
    out, width = rows.clone(), rows.shape[2]
    for h in range(rows.shape[0]):
        for i, token in enumerate(live):
            if i < prefix:
                continue
            sines, cosines = (t[h, token - prefix] if t.dim() == 3 else t[token - prefix] for t in table)
            for j in range(width):
                first = j < width // 2 if half else j % 2 == 0
                partner = (j + width // 2) % width if half else j ^ 1
                sign = -1.0 if first else 1.0
                out[h, i, j] = rows[h, i, j] * cosines[j] + sign * rows[h, i, partner] * sines[j]
    return out


def attend(attn: Any, x: Tensor, t: slow_model.Tokens, case: Case, layer: int, total: int) -> tuple[Tensor, Any, Layer]:
    """Attention output [n, C], keys [H, n, D], and what happened."""
    n, live = x.shape[0], t.anchor
    q, k, v = projected(attn, x)
    heads = q.shape[0]
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    unturned = k
    if case.tables is not None:
        half = not hasattr(attn, "qkv") or bool(attn.rotate_half)  # transformers knows one way
        q, k = (rotated(rows, live, case.prefix, case.tables[layer], half) for rows in (q, k))
    if k.shape[0] < heads:
        k, v = (torch.stack([rows[h * len(rows) // heads] for h in range(heads)]) for rows in (k, v))
    found = Layer(list(live))
    acts = (case.layers is None or layer in case.layers) and not case.recon
    keep = case.keep[layer] if isinstance(case.keep, tuple) else case.keep
    mask = torch.ones(heads, n, n, dtype=torch.bool)
    if acts and not (keep == 1.0 and case.mode != "threshold"):
        mask, found.scores = connections(attn.predictor, q, k, live, case, layer, total)
    if case.recon:
        rows = coefficients(attn.predictor, q, k, live, case, heads)
        found.scores = torch.stack([torch.stack([attn.predictor.w_up @ a for a in each]) for each in rows])
    found.mask, found.attention = mask, torch.zeros(heads, n, n, dtype=x.dtype)
    bias = torch.tensor([math.log(s) for s in t.size], dtype=x.dtype) if t.merged else torch.zeros(n, dtype=x.dtype)
    for h in range(heads):
        logits = q[h] @ k[h].T / math.sqrt(q.shape[2]) + bias
        rows = zip(logits.tolist(), mask[h].tolist(), strict=True)
        found.attention[h] = torch.tensor([softmax_over(*pair) for pair in rows], dtype=x.dtype)
    out = (found.attention @ v).permute(1, 0, 2).reshape(n, -1)
    for name in ("out_proj", "o_proj"):
        if hasattr(attn, name):
            return getattr(attn, name)(out), unturned, found
    out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * torch.sigmoid(attn.gate(x))
    return attn.proj(out), unturned, found


def branches(block: Any, x: Tensor, run: Any) -> Tensor:
    """The first residual branch of all libraries' blocks."""
    if hasattr(block, "layer_norm1"):
        return x + run(block.layer_norm1(x))
    if hasattr(block, "layernorm_before"):
        return x + run(block.layernorm_before(x))
    if hasattr(block, "layer_scale1"):
        return x + block.layer_scale1.lambda1 * run(block.norm1(x))
    if hasattr(block, "gamma_1"):
        return x + (1.0 if block.gamma_1 is None else block.gamma_1) * run(block.norm1(x))
    if hasattr(block, "ln_1"):
        return x + block.ls_1(run(block.ln_1(x)))
    if "Post" in type(block).__name__:
        return x + block.norm1(run(x))
    return x + block.ls1(run(block.norm1(x)))


def mlp(block: Any, x: Tensor) -> Tensor:
    """And the second."""
    if hasattr(block, "layer_norm2"):
        return x + block.mlp(block.layer_norm2(x))
    if hasattr(block, "layernorm_after"):
        return x + block.mlp(block.layernorm_after(x))
    if hasattr(block, "layer_scale2"):
        return x + block.layer_scale2.lambda1 * block.mlp(block.norm2(x))
    if hasattr(block, "gamma_2"):
        return x + (1.0 if block.gamma_2 is None else block.gamma_2) * block.mlp(block.norm2(x))
    if hasattr(block, "ln_1"):
        return x + block.ls_2(block.mlp(block.ln_2(x)))
    if "Post" in type(block).__name__:
        return x + block.norm2(block.mlp(x))
    return x + block.ls2(block.mlp(block.norm2(x)))


def run_slowly(blocks: list[Any], embedded: Tensor, case: Case) -> list[Result]:
    """Every image through the blocks; the blocks' attentions may carry predictors, which are read."""
    results = []
    for image in embedded:
        total = len(image)
        t = slow_model.Tokens(image, [1.0] * total, list(range(total)), [[i] for i in range(total)])
        layers, pruned = [], 0
        for layer, block in enumerate(blocks):
            seen: list[Any] = []

            def run(rows: Tensor, block: Any = block, layer: int = layer, seen: list[Any] = seen) -> Tensor:
                out, keys, found = attend(attention(block), rows, t, case, layer, total)  # noqa: B023
                seen.extend((keys, found))
                return out

            t.x = branches(block, t.x, run)
            if case.merging is not None:
                t = slow_model.merge(t, seen[0].mean(0), layer, len(blocks), case.merging, case.prefix)
            t.x = mlp(block, t.x)
            layers.append(seen[1])
            if layer in case.prune_after and not case.recon:
                pruned += 1
                t = prune(t, seen[1].attention, counted(case.token_keep**pruned, total - case.prefix), case.prefix)
        results.append(Result(t.x, t.anchor, layers))
    return results


def prune(t: slow_model.Tokens, attention: Tensor, count: int, prefix: int) -> slow_model.Tokens:
    """Section 5: the patches that the class token attends to most."""
    rank = [float(sum(attention[h, 0, i] for h in range(len(attention)))) for i in range(prefix, len(t.anchor))]
    rows = [*range(prefix), *(prefix + i for i in best(rank, min(count, len(rank))))]
    return slow_model.Tokens(t.x[rows], [t.size[i] for i in rows], [t.anchor[i] for i in rows],
                             [t.members[i] for i in rows], t.merged)  # fmt: skip
