"""Sparse attention on a GPU against the ways to do it with PyTorch alone: a case of gpu.py.

Everything runs interleaved in one process, on q, k, v as a fused projection leaves them (heads 64 wide). Forms that
attend to the same connections must agree with `dense_masked` in float32 before anything is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from check import relative_error
from torch import Tensor

from vtoken.accounting.timing import interleaved
from vtoken.methods.sparsifiner.predictor import ConnectivityPredictor
from vtoken.ops import Connections, backend, select_grouped, select_topk, sparse_attention
from vtoken.ops.sparse import lists
from vtoken.ops.sparse.connections import num_kept, query_order, select_reason

WIDTH, BASIS, GROUP = 64, 32, 64
#: Relative RMS error that a form may have in the dtype that is timed.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class SparseShape(NamedTuple):
    """One layer: images, side of the square patch grid (one class token beside it), heads, share of keys."""

    batch: int
    side: int
    heads: int
    ratio: float

    @property
    def tokens(self) -> int:
        """N."""
        return self.side**2 + 1

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.tokens} tokens, {self.ratio:.0%}"


class Layer(NamedTuple):
    """Its tensors, and the connections that it selects."""

    q: Tensor
    k: Tensor
    v: Tensor
    predictor: ConnectivityPredictor
    shape: SparseShape
    exact: Connections
    threshold: Connections
    grouped: Connections


def make_layer(shape: SparseShape, device: torch.device, dtype: torch.dtype) -> Layer:
    """Random tokens, and a predictor whose scores differ from key to key."""
    qkv = torch.randn(shape.batch, shape.tokens, 3, shape.heads, WIDTH, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    predictor = ConnectivityPredictor(WIDTH, shape.heads, num_tokens=shape.tokens, num_basis=BASIS, device=device)
    with torch.no_grad():
        for weight in (predictor.reduce_q.weight, predictor.reduce_k.weight):
            weight.normal_(std=0.2)
        predictor.w_up.normal_(std=0.05)
    predictor.eval()
    coefficients, basis = predictor.coefficients(q, k), predictor.basis()
    # The same number of keys on average as `exact` keeps.
    scores = coefficients[:1] @ basis
    threshold = scores.flatten(2).transpose(0, 1).flatten(1).float()
    limit = threshold.kthvalue(int((1 - shape.ratio) * threshold.shape[1]) + 1, dim=1).values
    found = [_select(kind, predictor, shape, q, k, limit) for kind in ("exact", "threshold", "grouped")]
    return Layer(q, k, v, predictor, shape, *found)


def _select(
    kind: str, predictor: ConnectivityPredictor, shape: SparseShape, q: Tensor, k: Tensor, limit: Tensor | None = None
) -> Connections:  # fmt: skip
    """Predictor and selection, as `Sparsifiner` runs them; without kernels `exact` stands for `threshold`, too."""
    coefficients, basis, grid = predictor.coefficients(q, k), predictor.basis(), (shape.side, shape.side)
    if kind == "grouped":
        return select_grouped(coefficients, basis, shape.ratio, grid=grid, group_size=GROUP)
    if not backend.use_triton("auto", coefficients, lambda: select_reason(coefficients, basis)):
        return select_topk(coefficients, basis, shape.ratio)
    order = query_order(grid, None, shape.tokens, shape.tokens - 1, coefficients)
    if kind == "threshold":
        return lists.select(coefficients, basis, threshold=limit, order=order)
    return lists.select(coefficients, basis, kept=num_kept(shape.ratio, shape.tokens), order=order)


def _flex(layer: Layer) -> Callable[[], Tensor]:
    """Compiled flex attention over a block mask of the exact connections."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    keep, (batch, heads), tokens = layer.exact.mask(), layer.exact.batch_and_heads, layer.shape.tokens
    mask = create_block_mask(lambda b, h, i, j: keep[b, h, i, j], batch, heads, tokens, tokens, keep.device)
    run = torch.compile(flex_attention, dynamic=False)
    return functools.partial(run, layer.q, layer.k, layer.v, block_mask=mask, scale=WIDTH**-0.5)


def forms(layer: Layer) -> dict[str, tuple[Callable[[], Tensor], Connections | None]]:
    """What is timed, and the connections that its result must be that of (None: dense attention)."""
    q, k, v, scale = layer.q, layer.k, layer.v, WIDTH**-0.5

    def attend(connections: Connections, how: str = "auto") -> Tensor:
        return sparse_attention(q, k, v, connections, scale=scale, backend=how)

    def with_selection(kind: str) -> Tensor:
        return attend(_select(kind, layer.predictor, layer.shape, q, k))

    exact, keep = layer.exact, layer.exact.mask()
    found: dict[str, tuple[Callable[[], Tensor], Connections | None]] = {
        "dense fused": (lambda: F.scaled_dot_product_attention(q, k, v, scale=scale), None),
        "boolean mask": (lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale), exact),
        "exact": (lambda: attend(exact), exact),
        "threshold": (lambda: attend(layer.threshold), layer.threshold),
        "grouped": (lambda: attend(layer.grouped), layer.grouped),
        "exact with selection": (lambda: with_selection("exact"), exact),
        "grouped with selection": (lambda: with_selection("grouped"), layer.grouped),
    }
    if q.is_cuda:
        found["flex attention"] = (_flex(layer), exact)
    return found


def check(layer: Layer, runs: dict[str, tuple[Callable[[], Tensor], Connections | None]]) -> None:
    """Every form gives the attention that it says, for the first image, against plain float32.

    Raises:
        RuntimeError: names the form that does not.
    """
    q, k, v = (x[:1].float() for x in (layer.q, layer.k, layer.v))
    for name, (run, connections) in runs.items():
        mask = None if connections is None else connections.mask()[:1]
        logits = q @ k.transpose(-1, -2) * WIDTH**-0.5
        weights = (logits if mask is None else logits.masked_fill(~mask, -float("inf"))).softmax(-1).nan_to_num(0.0)
        error = relative_error([weights @ v], [run()[:1].float()])
        if not error <= TOLERANCE[layer.q.dtype]:
            raise RuntimeError(f"{name}, {layer.shape.name}: off by {error:.2g} (relative RMS); no times printed")


def time_sparse(
    shape: SparseShape, rounds: int, device: torch.device, dtype: torch.dtype, calls: int, tick: Callable[[], None]
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per form: how many times faster than dense fused attention, and than the boolean mask."""
    with torch.inference_mode():
        layer = make_layer(shape, device, dtype)
        runs = forms(layer)
        check(layer, runs)
        timed: dict[str, Callable[[], object]] = {name: run for name, (run, _) in runs.items()}
        times = interleaved(timed, rounds=rounds, warmup=2, calls=calls, device=device, tick=tick)
    dense, masked, kept = times["dense fused"], times["boolean mask"], layer.exact.count
    frame = {"tokens": shape.tokens, "batch": shape.batch, "heads": shape.heads, "keep_ratio": shape.ratio,
             "dtype": str(dtype).removeprefix("torch."),
             "mac_factor": shape.batch * shape.heads * shape.tokens**2 / kept}  # fmt: skip
    return [
        {"what": name, **frame, "milliseconds": time.median * 1e3, "milliseconds_min": time.minimum * 1e3,
         "factor": dense.median / time.median, "factor_min": dense.minimum / time.minimum,
         "factor_over_mask": masked.median / time.median, "samples": time.samples, "dropped": time.dropped}
        for name, time in times.items()
    ]  # fmt: skip


HEAD = f"{'times faster than':<52} {'dense':>6} {'(min)':>7} {'masked':>7} {'MACs':>6} {'ours ms':>9}"


def sparse_line(row: dict[str, Any]) -> str:
    """One measurement as text, under `HEAD`; MACs: of the attention alone, dense over kept."""
    name = f"{row['what']}, batch {row['batch']}, {row['tokens']} tokens, {row['keep_ratio']:.0%}"
    cells = f"{row['factor']:>6.2f} {row['factor_min']:>7.2f} {row['factor_over_mask']:>7.2f} {row['mac_factor']:>6.1f}"
    return f"{name:<52} {cells} {row['milliseconds']:>9.3f}"
