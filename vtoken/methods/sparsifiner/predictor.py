"""The connectivity predictor: which keys a query will attend to, as a rank-K product (arXiv 2303.13755 section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vtoken import checks
from vtoken.errors import ConfigError, ShapeError
from vtoken.ops.largest import keep_largest
from vtoken.ops.rows import full_precision
from vtoken.ops.sparse.resize import resize_rows

Grid = tuple[int, int]
#: Bases and resized weights kept per predictor in eval mode: one or two for each image size in use.
_CACHED = 8


class ConnectivityPredictor(nn.Module):
    """Scores of all keys for every patch query of one attention layer; the parameters are shared by its heads.

    Queries and keys enter as the attention has them before scaling, [B, H, n, d], prefix tokens first. Everything is
    computed in float32 (float64 stays), under autocast too.

    Args:
        head_dim: d.
        num_heads: H; only the default of `scale` depends on it.
        num_tokens: N, prefix tokens included; may be left out if `grid` is given.
        grid: rows and columns of the patch grid; None: the square one of num_tokens - num_prefix patches, if any.
        num_prefix: prefix tokens P (class, registers, distillation).
        num_basis: K; None: N // reduce_n_factor up to N = 197, from there on as for 197.
        reduce_c_factor: d over the reduced width c.
        reduce_n_factor: N over K.
        share_proj: whether w_up and w_down are one parameter.
        coef_topk: coefficients kept per query; 0: as many as exceed `coef_threshold` (all if that is 0, too).
        coef_threshold: see `coef_topk`.
        basis_threshold: entries of the basis up to this become 0.
        basis_abs: whether the basis is |w_up|.
        scale: factor on the coefficients' logits; None: H ** -0.5.

    Raises:
        ConfigError: if a setting is out of range, or they do not fit each other.

    Example:
        >>> import torch, vtoken
        >>> predictor = vtoken.nn.ConnectivityPredictor(head_dim=8, num_heads=2, num_tokens=17)
        >>> q, k = torch.randn(2, 1, 2, 17, 8)
        >>> predictor.scores(q, k).shape  # of every patch query, for every key
        torch.Size([1, 2, 16, 17])

    Source: arXiv 2303.13755 section 3.2; docs/methods/sparsifiner.md 2 and 10.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_tokens: int | None = None,
        grid: Grid | None = None,
        num_prefix: int = 1,
        num_basis: int | None = None,
        reduce_c_factor: int = 2,
        reduce_n_factor: int = 6,
        share_proj: bool = False,
        coef_topk: int = 8,
        coef_threshold: float = 0.0,
        basis_threshold: float = 0.02,
        basis_abs: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = "ConnectivityPredictor"
        head_dim = checks.whole(owner, "head_dim", head_dim, 1)
        self.num_heads = checks.whole(owner, "num_heads", num_heads, 1)
        self.num_prefix = checks.whole(owner, "num_prefix", num_prefix, 0)
        self.num_tokens, self.grid = _tokens_and_grid(num_tokens, grid, self.num_prefix)
        reduce_n_factor = checks.whole(owner, "reduce_n_factor", reduce_n_factor, 1)
        reduce_c_factor = checks.whole(owner, "reduce_c_factor", reduce_c_factor, 1, head_dim)
        usual = max(1, min(self.num_tokens, 197) // reduce_n_factor)
        self.num_basis = usual if num_basis is None else checks.whole(owner, "num_basis", num_basis, 1)
        self.coef_topk = checks.whole(owner, "coef_topk", coef_topk, 0)
        self.coef_threshold = checks.number(owner, "coef_threshold", coef_threshold, 0)
        self.basis_threshold = checks.number(owner, "basis_threshold", basis_threshold, 0)
        self.basis_abs = checks.flag(owner, "basis_abs", basis_abs)
        self.share_proj = checks.flag(owner, "share_proj", share_proj)
        self.scale = self.num_heads**-0.5 if scale is None else checks.number(owner, "scale", scale)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce_q = nn.Linear(head_dim, head_dim // reduce_c_factor, **like)
        self.reduce_k = nn.Linear(head_dim, head_dim // reduce_c_factor, **like)
        self.w_down = nn.Parameter(torch.empty(self.num_tokens, self.num_basis, **like))
        self.w_up = self.w_down if share_proj else nn.Parameter(torch.empty_like(self.w_down))
        #: How transformers is told that two names are one parameter: its `save_pretrained` writes the second once.
        self._tied_weights_keys = {"w_up": "w_down"} if share_proj else {}
        self._cache: dict[tuple[str, Grid | None], tuple[Tensor, tuple[int, int], Tensor]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters: normal with deviation 0.02, cut at +-2, and zero biases."""
        # Not a set, whose order differs from run to run; w_up may be w_down.
        for weight in dict.fromkeys((self.reduce_q.weight, self.reduce_k.weight, self.w_down, self.w_up)):
            nn.init.trunc_normal_(weight, std=0.02, a=-2.0, b=2.0)
        nn.init.zeros_(self.reduce_q.bias)
        nn.init.zeros_(self.reduce_k.bias)

    def coefficients(
        self, q: Tensor, k: Tensor, *, live: Tensor | None = None, grid: Grid | None = None, reorder: bool = False
    ) -> Tensor:
        """Sparse coefficients of every patch query over the basis: [B, H, n - P, K], at least float32.

        Args:
            q, k: [B, H, n, d].
            live: which of the N tokens these are, [B, n], prefix tokens first; None: all of them.
            grid: rows and columns of the patch grid, where it is not the predictor's own.
            reorder: tokens are mixed before their width is reduced: a third fewer products where K = c, and other
                rounding, by which one row of keys in some 30 000 is another than in the published order.

        Raises:
            ShapeError: if the number of tokens does not fit.
        """
        a = self._all_coefficients(q, k, live, grid, reorder)
        if self.coef_topk:
            a = keep_largest(a, self.coef_topk)
        elif self.coef_threshold > 0:
            a = a * (a > self.coef_threshold)
        return a.transpose(-1, -2)

    def basis(self, *, live: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """The sparse basis, without gradient: [K, N], or [B, K, n] for `live` tokens [B, n].

        In eval mode it is kept until w_up changes (changes through `.data` in place are not seen before the next
        `train()` or `eval()`).
        """
        full = self._remember("basis", grid, self.w_up, self._make_basis)
        if live is None:
            return full
        return full.index_select(1, live.flatten()).view(-1, *live.shape).transpose(0, 1)

    def scores(self, q: Tensor, k: Tensor, *, live: Tensor | None = None, grid: Grid | None = None) -> Tensor:
        """Scores of all keys, [B, H, n - P, n], non-negative with `basis_abs`. For looking at: selection needs less."""
        basis = self.basis(live=live, grid=grid)
        with full_precision(q):
            return self.coefficients(q, k, live=live, grid=grid) @ (basis if live is None else basis.unsqueeze(1))

    def reconstruction(self, q: Tensor, k: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Estimate of the dense attention of the patch queries, [B, H, T, N], for training: nothing is cut, signed."""
        up = self._resized("up", grid)
        a = self._all_coefficients(q, k, None, grid)
        with full_precision(q):
            return a.transpose(-1, -2) @ up.to(a.dtype).t()

    def _all_coefficients(
        self, q: Tensor, k: Tensor, live: Tensor | None, grid: Grid | None, reorder: bool = False
    ) -> Tensor:  # fmt: skip
        """Softmax over the basis, [B, H, K, n - P]: columns are queries."""
        down = self._resized("down", grid)
        self._check(q, k, live, down.shape[0])
        with full_precision(q):
            dtype = _precise(q, down)
            down = (down if live is None else F.embedding(live, down)).to(dtype).expand(q.shape[0], -1, -1)
            queries, keys = q[:, :, self.num_prefix :].to(dtype), k.to(dtype)
            return (self._reordered if reorder else self._logits)(queries, keys, down).softmax(-2)

    def _logits(self, q: Tensor, k: Tensor, down: Tensor) -> Tensor:
        """Of patch queries [B, H, T, d] and keys [B, H, n, d], mixed by down [B, n, K]: [B, H, K, T]."""
        wq, bq, wk, bk = self._reductions(q.dtype)
        mixed = down.transpose(1, 2).unsqueeze(1) @ F.linear(k, wk, bk)  # [B, H, K, c]
        return mixed @ F.linear(q, wq, bq).transpose(-1, -2) * self.scale

    def _reordered(self, q: Tensor, k: Tensor, down: Tensor) -> Tensor:
        """`_logits`: tokens are mixed first, and the K mixtures are widened again instead of reducing every query."""
        wq, bq, wk, bk = self._reductions(q.dtype)
        # All heads are mixed at once, in the layout in which a fused projection leaves them.
        mixed = torch.bmm(rearrange(down, "b n basis -> b basis n"), rearrange(k, "b h n d -> b n (h d)"))
        mixed = rearrange(mixed, "b basis (h d) -> b h basis d", h=q.shape[1])
        reduced = (mixed @ wk.t() + down.sum(1)[:, None, :, None] * bk) * self.scale  # [B, H, K, c]
        logits = (reduced @ wq) @ q.transpose(-1, -2)
        return logits.add_((reduced @ bq).unsqueeze(-1))

    def _reductions(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wq, bq, wk, bk = (x.to(dtype) for m in (self.reduce_q, self.reduce_k) for x in (m.weight, m.bias))
        return wq, bq, wk, bk

    def _check(self, q: Tensor, k: Tensor, live: Tensor | None, num_tokens: int) -> None:
        if q.dim() != 4 or q.shape != k.shape or q.shape[3] != self.reduce_q.in_features:
            d = self.reduce_q.in_features
            raise ShapeError(f"q and k must be [B, H, n, {d}], got {tuple(q.shape)} and {tuple(k.shape)}")
        if live is not None:
            if tuple(live.shape) != (q.shape[0], q.shape[2]):
                raise ShapeError(f"live must be [{q.shape[0]}, {q.shape[2]}], got {tuple(live.shape)}")
        elif q.shape[2] != num_tokens:
            raise ShapeError(
                f"{q.shape[2]} tokens, but the predictor is for {num_tokens} ({self.num_prefix} prefix tokens and "
                f"{num_tokens - self.num_prefix} patches). Pass grid=(rows, columns) for another image size, or live= "
                "if tokens have been removed"
            )

    def _make_basis(self, grid: Grid | None) -> Tensor:
        up = self._resize(self.w_up, grid, mean=False)
        up = up.to(_precise(up)).t()
        up = up.abs() if self.basis_abs else up
        return up.masked_fill(~(up > self.basis_threshold), 0.0).contiguous()

    def _resized(self, which: str, grid: Grid | None) -> Tensor:
        """w_down or w_up for a grid; with its gradient where one may be asked for."""
        source = self.w_down if which == "down" else self.w_up
        if grid is None or grid == self.grid:
            return source
        if torch.is_grad_enabled() and source.requires_grad:
            return self._resize(source, grid, mean=which == "down")
        return self._remember(which, grid, source, lambda g: self._resize(source, g, mean=which == "down"))

    def _resize(self, rows: Tensor, grid: Grid | None, *, mean: bool) -> Tensor:
        if grid is None or grid == self.grid:
            return rows
        if self.grid is None:
            raise ShapeError(
                f"this predictor is for {self.num_tokens} tokens of no known grid, so it cannot be resized to "
                f"{grid[0]} x {grid[1]}; make it with grid=(rows, columns)"
            )
        return resize_rows(rows, self.grid, grid, num_prefix=self.num_prefix, mean=mean)

    def _remember(
        self, name: str, grid: Grid | None, source: Tensor, make: Callable[[Grid | None], Tensor]
    ) -> Tensor:  # fmt: skip
        """`make(grid)`, without gradient; in eval mode the result is kept while `source` stays what it is."""
        key = (name, None if grid == self.grid else grid)
        keep = not (self.training or torch.compiler.is_compiling()) and type(source) is nn.Parameter
        if not keep or source.is_inference():  # such tensors do not say when they are changed
            with torch.no_grad():
                return make(grid)
        stamp = (source._version, source.data_ptr())
        found = self._cache.get(key)
        # dtype and device are those of `source`; holding on to it makes sure that `is` compares living objects.
        if found is None or found[0] is not source or found[1] != stamp:
            # A tensor made inside inference mode could not be used by autograd later.
            with torch.inference_mode(False), torch.no_grad():
                found = (source, stamp, make(grid))
            self._cache.pop(key, None)
            while len(self._cache) >= _CACHED:
                self._cache.pop(next(iter(self._cache)), None)
            self._cache[key] = found
        return found[2]

    def train(self, mode: bool = True) -> ConnectivityPredictor:
        """Set training or eval mode; either way what was remembered is forgotten."""
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConnectivityPredictor:
        self._cache.clear()
        super()._apply(fn, recurse)
        self._tie()
        return self

    def _tie(self) -> None:
        # Some moves (to_empty, load_state_dict with assign=True) make two parameters of one.
        if self.share_proj:
            self.w_up = self.w_down

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Weights of a square grid are resized when this predictor has another grid; a shared one needs one name."""
        if self.share_proj and prefix + "w_down" in state_dict:
            state_dict.setdefault(prefix + "w_up", state_dict[prefix + "w_down"])
        for name in ("w_down", "w_up"):
            rows = state_dict.get(prefix + name)
            if isinstance(rows, Tensor) and rows.dim() == 2 and rows.shape[0] != self.num_tokens:
                state_dict[prefix + name] = self._resized_for_loading(prefix + name, rows, mean=name == "w_down")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._tie()

    def _resized_for_loading(self, name: str, rows: Tensor, *, mean: bool) -> Tensor:
        patches = rows.shape[0] - self.num_prefix
        side = math.isqrt(max(patches, 0))
        if self.share_proj:
            raise ShapeError(
                f"{name} has {rows.shape[0]} rows, this predictor {self.num_tokens} tokens. With share_proj one "
                "parameter cannot be resized both as w_down (scaled) and as w_up (not): make the predictor with the "
                "checkpoint's grid and pass grid= in the calls"
            )
        if side == 0 or side * side != patches or self.grid is None:
            raise ShapeError(
                f"{name} has {rows.shape[0]} rows, this predictor {self.num_tokens} tokens "
                f"(grid {self.grid}, {self.num_prefix} prefix tokens). Only square grids can be told from the number "
                "of rows; resize others with vtoken.ops.sparse.resize.resize_rows"
            )
        return resize_rows(rows, (side, side), self.grid, num_prefix=self.num_prefix, mean=mean)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}

    def extra_repr(self) -> str:
        """Settings, shown by print(module)."""
        return (
            f"num_tokens={self.num_tokens}, grid={self.grid}, num_prefix={self.num_prefix}, "
            f"num_basis={self.num_basis}, coef_topk={self.coef_topk}, share_proj={self.share_proj}"
        )


def _precise(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _tokens_and_grid(num_tokens: int | None, grid: Grid | None, num_prefix: int) -> tuple[int, Grid | None]:
    if grid is None:
        if num_tokens is not None:
            num_tokens = checks.whole("ConnectivityPredictor", "num_tokens", num_tokens)
        if num_tokens is None or num_tokens <= num_prefix:
            raise ConfigError(
                f"num_tokens={num_tokens} must exceed num_prefix={num_prefix}; or pass grid=(rows, columns)"
            )
        side = math.isqrt(num_tokens - num_prefix)
        return num_tokens, (side, side) if side * side == num_tokens - num_prefix else None
    grid = checks.grid("ConnectivityPredictor", "grid", grid)
    expected = grid[0] * grid[1] + num_prefix
    if num_tokens is not None and checks.whole("ConnectivityPredictor", "num_tokens", num_tokens) != expected:
        raise ConfigError(f"grid={grid} and num_prefix={num_prefix} make {expected} tokens, not {num_tokens}")
    return expected, grid
