"""Sparsifiner: every query attends to the keys that a small learned predictor connects it to (arXiv 2303.13755)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vtoken import checks
from vtoken.core.config import MethodConfig, register_method
from vtoken.core.method import AttentionMacs, AttentionMethod, Method
from vtoken.core.slots import AttentionCall
from vtoken.errors import ConfigError, ShapeError
from vtoken.methods.merging import schedule
from vtoken.methods.sparsifiner.predictor import ConnectivityPredictor
from vtoken.methods.sparsifiner.pruning import TokenPruning
from vtoken.ops.backend import use_triton
from vtoken.ops.largest import largest_index
from vtoken.ops.rows import full_precision
from vtoken.ops.sparse import lists
from vtoken.ops.sparse.attention import WAYS, attention_map, sparse_attention
from vtoken.ops.sparse.connections import (
    Connections,
    num_kept,
    query_order,
    select_grouped,
    select_reason,
    select_threshold,
    select_topk,
)
from vtoken.ops.sparse.masking import LogitBias

if TYPE_CHECKING:
    from vtoken.core.spec import HostSpec

MODES = ("exact", "threshold", "grouped", "random")
PHASES = ("sparse", "recon")


@register_method
@dataclass(frozen=True, kw_only=True)
class Sparsifiner(MethodConfig):
    """Settings of learned sparse attention. The predictors must be trained: see `vtoken.train` and examples/.

    Args:
        keep_ratio: share of the keys that a patch query keeps, in (0, 1]; one number or one per block.
        mode: "exact" (the best keys of every query), "grouped" (the best keys of every group of neighbouring queries;
            the form that is fast), "threshold" (all keys whose score exceeds a calibrated number, see
            `vtoken.calibrate_threshold`), or "random" (a control: random keys, the predictor is not asked).
        query_group: queries per group in "grouped".
        layers: blocks with sparse attention; None means all. Negative indices count from the end.
        num_basis: basis vectors K; None: a sixth of the tokens, at most 32.
        reduce_c_factor: head width over the predictor's width.
        share_proj: whether the predictor mixes tokens and spreads them with the same matrix.
        coef_topk: coefficients that a query keeps; 0: those that exceed `coef_threshold`.
        coef_threshold: see there; counts only if `coef_topk` is 0, and with 0 all are kept.
        basis_threshold: entries of the basis up to this are 0.
        basis_abs: whether the basis is taken by its absolute value.
        scale: factor on the predictor's logits; None: heads ** -0.5, as published.
        score_threshold: initial threshold of every head in "threshold".
        token_keep_ratio: with less than 1, patch tokens are pruned, too: after the j-th block of `prune_after`,
            ceil(token_keep_ratio ** j * T) of the T patches are left, the best by the class token's attention. They
            leave the sequence, which is what saves time; the published code sets them to zero and lets the class token
            go on looking at them, so that its logits differ a little (up to 0.12 on a small model).
        prune_after: those blocks.
        phase: "sparse", or "recon" while the predictors learn: attention runs dense.
        backend: how sparse attention runs, see `vtoken.ops.sparse.attention`.
        seed: of the predictors' initial weights and of "random".

    Raises:
        ConfigError: for values out of range; for lists that do not fit the model when it is applied.

    Example:
        >>> import timm, torch, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), vtoken.Sparsifiner(keep_ratio=0.1))
        >>> _, trace = vtoken.trace(model, torch.randn(1, 3, 160, 160))
        >>> round(trace.attention[0].density, 2)  # 11 of 101 keys
        0.11

    Source: arXiv 2303.13755; docs/methods/sparsifiner.md.
    """

    method: ClassVar[str] = "sparsifiner"

    keep_ratio: Any = 0.25
    mode: str = "exact"
    query_group: int = 64
    layers: tuple[int, ...] | None = None
    num_basis: int | None = None
    reduce_c_factor: int = 2
    share_proj: bool = False
    coef_topk: int = 8
    coef_threshold: float = 0.0
    basis_threshold: float = 0.02
    basis_abs: bool = True
    scale: float | None = None
    score_threshold: float = 1e-4
    token_keep_ratio: float = 1.0
    prune_after: tuple[int, ...] = (3, 6, 9)
    phase: str = "sparse"
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        what = "the share of keys that a query keeps, "
        ratio = checks.one_or_several(owner, "keep_ratio", self.keep_ratio, checks.share, what=what)
        object.__setattr__(self, "keep_ratio", ratio)
        object.__setattr__(self, "token_keep_ratio", checks.share(owner, "token_keep_ratio", self.token_keep_ratio))
        for name, lowest in {"coef_threshold": 0, "basis_threshold": 0, "score_threshold": None, "scale": None}.items():
            if name != "scale" or self.scale is not None:
                object.__setattr__(self, name, checks.number(owner, name, getattr(self, name), lowest))
        for name in ("share_proj", "basis_abs"):
            checks.flag(owner, name, getattr(self, name))
        checks.choice(owner, "mode", self.mode, MODES)
        checks.choice(owner, "phase", self.phase, PHASES)
        checks.choice(owner, "backend", self.backend, WAYS)
        if (self.backend == "grouped") != (self.mode == "grouped") and self.backend in ("grouped", "sparse"):
            why = "groups of queries share their keys" if self.mode == "grouped" else "every query has keys of its own"
            raise ConfigError(
                f"{owner}(mode={self.mode!r}, backend={self.backend!r}): {why}, which that backend does not serve; use "
                'backend="auto"'
            )
        for name in ("layers", "prune_after"):
            if name != "layers" or self.layers is not None:
                object.__setattr__(self, name, checks.wholes(owner, name, getattr(self, name)))
        least = {"query_group": 1, "reduce_c_factor": 1, "coef_topk": 0, "num_basis": 1, "seed": 0}
        for name, bound in least.items():
            if name != "num_basis" or self.num_basis is not None:
                object.__setattr__(self, name, checks.whole(owner, name, getattr(self, name), bound))

    def counted(self) -> MethodConfig:
        """With dense attention: kept keys depend on the image."""
        return self.replace(keep_ratio=1.0, mode="exact", backend="auto")

    def build(self, depth: int) -> tuple[Method, ...]:
        """Sparse attention, and the pruning of tokens if it is asked for."""
        owner, attention = type(self).__name__, SparseAttention(self, depth)
        if self.token_keep_ratio == 1:
            return (attention,)
        chosen = schedule.chosen_layers(owner, self.prune_after, depth, name="prune_after")
        if not all(attention.acts_on(layer) for layer in chosen):
            raise ConfigError(
                f"{owner}(prune_after={list(self.prune_after)}, layers={list(self.layers or ())}): tokens are ranked "
                "by the attention of the block that they leave, which must be among `layers`"
            )
        # While predictors learn, the student's outputs are the teacher's.
        return (attention,) if self.phase == "recon" else (attention, TokenPruning(self.token_keep_ratio, chosen))


class SparseAttention(AttentionMethod):
    """A Sparsifiner config resolved for `depth` blocks."""

    def __init__(self, config: Sparsifiner, depth: int) -> None:
        owner = type(config).__name__
        self.config = config
        self._layers = schedule.chosen_layers(owner, config.layers, depth)
        self._ratios = schedule.per_layer(owner, "keep_ratio", config.keep_ratio, depth)

    def acts_on(self, layer: int) -> bool:
        """Whether the block is among the chosen layers."""
        return layer in self._layers

    def is_stock(self, layer: int) -> bool:
        """Dense while predictors learn, and where every key is kept."""
        return self.config.phase == "recon" or (self._ratios[layer] == 1 and self.config.mode != "threshold")

    def predictor(self, layer: int, spec: HostSpec, like: Tensor) -> nn.Module:
        """A new predictor with its own seed; the global generators are left alone."""
        with torch.random.fork_rng(devices=[]), torch.device("meta" if like.device.type == "meta" else "cpu"):
            # Not torch.manual_seed, which would seed every accelerator's generator, too.
            torch.default_generator.manual_seed(self.config.seed * 1009 + layer)
            made: Any = ConnectivityPredictor(spec.head_dim, spec.num_heads, grid=spec.grid, num_prefix=spec.num_prefix,
                                         dtype=torch.float32, **self._settings())  # fmt: skip
            made.register_buffer(
                "threshold", torch.full((spec.num_heads,), self.config.score_threshold, dtype=torch.float32)
            )
            made.score_threshold = self.config.score_threshold
        placed: nn.Module = made.to(like.device, like.dtype)
        return placed

    def fits(self, layer: int, predictor: nn.Module) -> None:
        """Only what needs no other parameters can change."""
        assert isinstance(predictor, ConnectivityPredictor)
        wanted = self._settings()
        width = predictor.reduce_q.in_features // wanted["reduce_c_factor"]
        same = predictor.share_proj == wanted["share_proj"] and predictor.reduce_q.out_features == width
        if not same or wanted["num_basis"] not in (None, predictor.num_basis):
            raise ConfigError(
                "num_basis, reduce_c_factor and share_proj shape the predictor's parameters, which configure keeps; "
                "use vtoken.apply(model, ..., replace=True) for new ones"
            )

    def tune(self, predictor: Any) -> None:
        """Give a predictor that `fits` the settings that shape no parameter."""
        for name in _TUNABLE:
            setattr(predictor, name, getattr(self.config, name))
        predictor.scale = predictor.num_heads**-0.5 if self.config.scale is None else self.config.scale
        if predictor.score_threshold != self.config.score_threshold:  # a new one takes the place of calibrated ones
            predictor.score_threshold = self.config.score_threshold
            predictor.get_buffer("threshold").fill_(self.config.score_threshold)
        predictor.train(predictor.training)  # forgets the basis made with the old ones

    def _settings(self) -> dict[str, Any]:
        names = ("num_basis", "reduce_c_factor", "share_proj", *_TUNABLE)
        return {name: getattr(self.config, name) for name in names}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, predictor: nn.Module, call: AttentionCall) -> Tensor:
        """Attention [B, H, T, D] over the kept keys; leaves in `call` what is asked for."""
        assert isinstance(predictor, ConnectivityPredictor)
        if call.wants_cls:
            call.cls = _first_row(q, k, call)
        if self.is_stock(call.layer) or q.shape[0] == 0:  # no image, nothing to select from
            if call.record is not None:
                self._record_dense(q, k, predictor, call)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=call.mask, dropout_p=call.dropout, scale=call.scale
            )
        with full_precision(q):  # masks must not depend on autocast
            connections = self.connect(q, k, v, predictor, call)
        if call.record is not None:
            self._record(q, k, predictor, connections, call)
        return sparse_attention(q, k, v, connections, scale=call.scale, num_prefix=call.num_prefix, attn_mask=call.mask,
                                dropout_p=call.dropout, backend=self.config.backend)  # fmt: skip

    def connect(
        self, q: Tensor, k: Tensor, v: Tensor, predictor: ConnectivityPredictor, call: AttentionCall
    ) -> Connections:
        """The keys that every query keeps."""
        config, ratio, original = self.config, self._ratios[call.layer], call.slot.embedded
        if config.mode == "random":
            return _random(q, ratio, original, config.seed * 1009 + call.layer, call.num_prefix)
        live, grid = call.slot.anchor, call.grid
        # The published order of products where the published keys are asked for.
        fast = config.mode == "grouped"
        coefficients = predictor.coefficients(q.detach(), k.detach(), live=live, grid=grid, reorder=fast).detach()
        basis = predictor.basis(live=live, grid=grid)
        if config.mode != "grouped" and self._by_kernels(q, k, v, coefficients, basis, call):
            return self._listed(coefficients, basis, predictor, call)
        if config.mode == "threshold":
            return select_threshold(coefficients, basis, predictor.get_buffer("threshold"))
        if config.mode == "exact":
            return select_topk(coefficients, basis, ratio, num_original=original)
        shape = grid or predictor.grid
        if shape is None:
            raise ConfigError("mode='grouped' orders queries on the patch grid, which is not known here")
        return select_grouped(coefficients, basis, ratio, grid=shape, group_size=config.query_group, live=live,
                              num_original=original)  # fmt: skip

    def _by_kernels(
        self, q: Tensor, k: Tensor, v: Tensor, coefficients: Tensor, basis: Tensor, call: AttentionCall
    ) -> bool:
        """Whether kernels both select and attend; else connections are in a form that any backend takes."""

        def reason() -> str:
            bias = LogitBias.of(None, call.mask, (*q.shape[:3], q.shape[2]))
            return select_reason(coefficients, basis) or lists.reason(q, k, v, bias, call.dropout)

        wanted = self.config.backend
        return wanted in ("auto", "triton") and use_triton(wanted, q, reason)

    def _listed(
        self, coefficients: Tensor, basis: Tensor, predictor: ConnectivityPredictor, call: AttentionCall
    ) -> Connections:
        live, shape = call.slot.anchor, call.grid or predictor.grid
        # Neighbours in the picture keep much the same keys, which makes lists short; nothing else depends on the order.
        order = None
        if shape is not None:
            order = query_order(shape, live, basis.shape[-1], coefficients.shape[2], coefficients)
        if self.config.mode == "threshold":
            return lists.select(coefficients, basis, threshold=predictor.get_buffer("threshold"), order=order)
        kept = num_kept(self._ratios[call.layer], basis.shape[-1], call.slot.embedded)
        return lists.select(coefficients, basis, kept=kept, order=order)

    def _record(
        self, q: Tensor, k: Tensor, predictor: ConnectivityPredictor, connections: Connections, call: AttentionCall
    ) -> None:
        record = call.record
        assert record is not None
        record.kept = connections.count
        batch, heads = connections.batch_and_heads
        prefix = batch * heads * connections.num_prefix * connections.num_tokens
        pairs = batch * heads * connections.num_queries * connections.num_tokens
        record.density = (connections.count - prefix) / max(1, pairs)
        if "mask" in record.wants:
            record.mask = connections.mask()
        if "scores" in record.wants:
            record.scores = self._scores(q, k, predictor, call)
        if "attention" in record.wants:
            record.attention = attention_map(q, k, connections, scale=call.scale, attn_mask=call.mask)

    def _record_dense(self, q: Tensor, k: Tensor, predictor: ConnectivityPredictor, call: AttentionCall) -> None:
        record = call.record
        assert record is not None
        batch, heads, tokens = q.shape[:3]
        record.kept = batch * heads * tokens * tokens
        if "mask" in record.wants:
            record.mask = torch.ones(batch, heads, tokens, tokens, dtype=torch.bool, device=q.device)
        if "scores" in record.wants:
            record.scores = self._scores(q, k, predictor, call)
        if "attention" in record.wants:
            record.attention = _weights(q, k, call.scale, call.mask)

    def _scores(self, q: Tensor, k: Tensor, predictor: ConnectivityPredictor, call: AttentionCall) -> Tensor:
        with full_precision(q):
            if self.config.phase == "sparse":
                return predictor.scores(q, k, live=call.slot.anchor, grid=call.grid)
            if call.slot.anchor is not None and q.shape[2] < call.slot.embedded:
                raise ShapeError("the reconstruction phase needs all tokens; apply what removes tokens after it")
            # Queries and keys are the teacher's: only the predictor learns.
            return predictor.reconstruction(q.detach(), k.detach(), grid=call.grid)

    def macs(
        self, layer: int, tokens: int, embedded: int, spec: HostSpec, predictor: nn.Module | None
    ) -> AttentionMacs:
        """By the formulas of docs/methods/sparsifiner.md 7; the basis' entries are counted in the predictor's weights.

        "threshold" counts as keeping the share `keep_ratio`, which `vtoken.calibrate_threshold` sets.
        """
        width, patches = spec.num_heads * spec.head_dim, tokens - spec.num_prefix
        dense = 2 * tokens * tokens * width
        if not self.acts_on(layer) or self.is_stock(layer):
            return AttentionMacs(dense, dense)
        kept = num_kept(self._ratios[layer], tokens, embedded)
        core = 2 * width * (patches * kept + spec.num_prefix * tokens)
        if self.config.mode == "random":
            return AttentionMacs(dense, core)
        reduced = spec.head_dim // self.config.reduce_c_factor
        native = spec.num_prefix + spec.grid[0] * spec.grid[1]
        basis = self.config.num_basis or int(getattr(predictor, "num_basis", max(1, min(native, 197) // 6)))
        mixing = 2 * tokens * width * reduced + (tokens + patches) * basis * spec.num_heads * reduced
        rows = patches if self.config.mode != "grouped" else math.ceil(patches / self.config.query_group)
        entries = tokens if predictor is None else self._entries(predictor)
        up = rows * spec.num_heads * min(self.config.coef_topk or basis, basis) * entries
        return AttentionMacs(dense, core, mixing, round(up))

    def _entries(self, predictor: Any) -> float:
        """Mean number of entries of a basis vector that are not 0."""
        if predictor.w_up.device.type == "meta":
            return float(predictor.w_up.shape[0])
        basis = predictor.basis()
        return float((basis != 0).sum()) / basis.shape[0]


#: Random numbers of "random" alive at one time.
_DRAWN = 2**16
#: Settings of a predictor that shape no parameter.
_TUNABLE = ("coef_topk", "coef_threshold", "basis_threshold", "basis_abs", "scale")


def _first_row(q: Tensor, k: Tensor, call: AttentionCall) -> Tensor:
    """Attention of the class token [B, H, T], which keeps all its keys."""
    mask = call.mask
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., :1, :]
    return _weights(q[:, :, :1].detach(), k.detach(), call.scale, mask)[:, :, 0]


def _weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Plain attention, at least in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with full_precision(q):
        logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)
        # Queries from which the mask took all keys attend to nothing, as in `attention_map`.
        empty = (logits == -math.inf).all(-1, keepdim=True)
        return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _random(q: Tensor, ratio: float, original: int, seed: int, num_prefix: int) -> Connections:
    """Keys drawn uniformly for every head and query, the same for all images."""
    batch, heads, tokens, _ = q.shape
    kept, rng = num_kept(ratio, tokens, original), torch.Generator().manual_seed(seed)
    rows, step = range(tokens - num_prefix), max(1, _DRAWN // (heads * tokens))
    draws = [largest_index(torch.rand(len(rows[i : i + step]), heads, tokens, generator=rng, dtype=torch.float32), kept)
             for i in rows[::step]]  # fmt: skip
    index = rearrange(torch.cat(draws), "query h key -> h query key").to(q.device)
    return Connections(tokens, index=index.expand(batch, -1, -1, -1))
