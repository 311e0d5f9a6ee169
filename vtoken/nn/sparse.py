"""Sparsifiner's attention as a module of its own, for people who build their own network."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from vtoken import checks
from vtoken.core.method import KeepAll
from vtoken.core.records import AttentionRecord
from vtoken.core.spec import HostSpec
from vtoken.core.state import TokenState
from vtoken.core.trace import current_trace
from vtoken.errors import ConfigError, ShapeError
from vtoken.methods.sparsifiner.settings import SparseAttention as SparseAttentionMethod
from vtoken.methods.sparsifiner.settings import Sparsifiner


class SparseAttention(nn.Module):
    """Multi-head self-attention over the keys that a connectivity predictor keeps.

    Its parameters are called as those of timm's Attention (`qkv`, `proj`) with the `predictor` beside them, which is
    what `vtoken.apply` makes of an attention that is already there. `vtoken.tracing` of it, or of a network that holds
    several, records what each one did in `Trace.attention`, in the order in which they ran.

    Args:
        dim: channels C.
        num_heads: heads H.
        grid: patch rows and columns.
        num_prefix: class and register tokens before the patches.
        config: settings; `layers`, `token_keep_ratio` and `prune_after` are for whole models.
        qkv_bias: whether the q, k, v projection has a bias.

    Raises:
        ConfigError: if a value is out of range, or heads do not divide the channels.

    Example:
        >>> import torch, vtoken
        >>> attention = vtoken.nn.SparseAttention(48, 3, grid=(4, 4), config=vtoken.Sparsifiner(keep_ratio=0.5))
        >>> attention(torch.randn(2, 17, 48)).shape
        torch.Size([2, 17, 48])
        >>> with vtoken.tracing(attention, maps=("mask",)) as record:
        ...     out = attention(torch.randn(2, 17, 48))
        >>> record.attention[0].mask.shape
        torch.Size([2, 3, 17, 17])
    """

    _vtoken_records = True  # for vtoken.tracing

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        num_prefix: int = 1,
        config: Sparsifiner | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        dim = checks.whole("SparseAttention", "dim", dim, 1)
        num_heads = checks.whole("SparseAttention", "num_heads", num_heads, 1)
        grid = checks.grid("SparseAttention", "grid", grid)
        num_prefix = checks.whole("SparseAttention", "num_prefix", num_prefix, 0)
        checks.flag("SparseAttention", "qkv_bias", qkv_bias)
        if config is not None and not isinstance(config, Sparsifiner):
            raise ConfigError(f"SparseAttention(config={config!r}): must be vtoken.Sparsifiner settings")
        if dim % num_heads:
            raise ConfigError(f"SparseAttention(dim={dim}, num_heads={num_heads}): heads must divide the channels")
        self.num_heads, self.num_prefix, self.grid = num_heads, num_prefix, grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        spec = HostSpec("SparseAttention", 1, dim, num_heads, dim // num_heads, num_prefix, grid, "", "absolute")
        settings = (config or Sparsifiner()).replace(layers=None, token_keep_ratio=1.0)
        self._method = SparseAttentionMethod(settings, 1)
        self.predictor = self._method.predictor(0, spec, self.qkv.weight)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, record: AttentionRecord | None = None) -> Tensor:
        """Tokens [B, P + rows * columns, C], prefix first, to the same.

        Args:
            attn_mask: bool (True: may attend) or bias, broadcastable to [B, H, T, T].
            record: filled with what happened instead of a record of its own; `vtoken.tracing` needs none.

        Raises:
            ShapeError, InputError: if the tokens do not fit the module, or are no tensor.
        """
        checks.tensor("SparseAttention", "x", x)
        if x.dim() != 3 or x.shape[2] != self.qkv.in_features:
            raise ShapeError(f"x must be [B, T, {self.qkv.in_features}], got {tuple(x.shape)}")
        q, k, v = rearrange(self.qkv(x), "b n (part h d) -> part b h n d", part=3, h=self.num_heads).unbind(0)
        trace = current_trace(self)
        state = TokenState(
            KeepAll(), self.num_prefix, track_anchor=False, track_dest=False, maps=None if trace is None else trace.maps
        )
        state.enter(0, x)
        state.grid = self.grid
        call = state.call(0, scale=q.shape[-1] ** -0.5, mask=attn_mask, dropout=0.0, wants_cls=False)
        if record is not None:
            call.record, state.records = record, [record]
        out: Tensor = self._method.attend(q, k, v, self.predictor, call)
        if trace is not None:
            state.skip(0)
            trace.record_attention(self, state)
        projected: Tensor = self.proj(rearrange(out, "b h n d -> b n (h d)"))
        return projected
