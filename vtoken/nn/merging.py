"""Merging as modules: MergeTokens (tokens, metric, sizes in; fewer out) and a transformer block around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtoken import checks
from vtoken.core.method import BlockMethod
from vtoken.core.slots import Slot
from vtoken.errors import ConfigError, ShapeError
from vtoken.methods.merging.base import MergeConfig
from vtoken.ops import key_metric, size_bias


class MergeTokens(nn.Module):
    """One merge as a layer without parameters; the very step that `vtoken.apply` puts into a block.

    Args:
        config: settings, e.g. `vtoken.PiToMe(ratio=0.9)`.
        layer: which block this is, for settings that change with depth (PiToMe's margin).
        depth: number of blocks of the network.
        num_prefix: leading tokens that never merge (class, registers).

    Raises:
        ConfigError: if a number is out of range, or the settings are none of merging.

    Example:
        >>> import torch, vtoken
        >>> merge = vtoken.nn.MergeTokens(vtoken.PiToMe(ratio=0.75), num_prefix=1)
        >>> x = torch.randn(2, 17, 32)
        >>> y, size = merge(x, metric=x)
        >>> y.shape, size.sum(1)
        (torch.Size([2, 13, 32]), tensor([17., 17.]))
    """

    def __init__(self, config: MergeConfig, *, layer: int = 0, depth: int = 1, num_prefix: int = 0) -> None:
        super().__init__()
        if not isinstance(config, MergeConfig):
            raise ConfigError(f"MergeTokens takes merging settings such as vtoken.PiToMe(ratio=0.9), got {config!r}")
        depth = checks.whole("MergeTokens", "depth", depth, 1)
        layer = checks.whole("MergeTokens", "layer", layer, 0, depth - 1)
        num_prefix = checks.whole("MergeTokens", "num_prefix", num_prefix, 0)
        if layer > 0 and config.protect:
            raise ConfigError("protect names embedded patches, which a later layer cannot find; use it with layer=0")
        self.config = config
        self.layer = layer
        self.num_prefix = num_prefix
        self._method: BlockMethod = config.build(depth)

    def forward(self, x: Tensor, metric: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Merge.

        Args:
            x: tokens [B, T, C].
            metric: what they are compared by, [B, T, d] (for instance keys averaged over heads).
            size: patches per token, [B, T]; None means ones.

        Returns:
            Tokens [B, T', C] and float32 sizes [B, T'].

        Raises:
            ShapeError: if the three do not fit each other, or there are fewer tokens than prefix tokens.
            InputError: if one is no tensor.
        """
        for name, rows in (("x", x), ("metric", metric)):
            checks.tensor("MergeTokens", name, rows)
        if x.dim() != 3 or metric.dim() != 3 or metric.shape[:2] != x.shape[:2]:
            raise ShapeError(
                f"x must be [B, T, C] and metric [B, T, d], got {tuple(x.shape)} and {tuple(metric.shape)}"
            )
        if size is not None and checks.tensor("MergeTokens", "size", size).shape != x.shape[:2]:
            raise ShapeError(f"size must be {list(x.shape[:2])}, got {tuple(size.shape)}")
        if x.shape[1] < self.num_prefix:
            raise ShapeError(f"{x.shape[1]} tokens are fewer than num_prefix={self.num_prefix}")
        if self._method.num_removed(self.layer, x.shape[1] - self.num_prefix) > 0:
            x, slot = self._method.on_block(self.layer, x, metric, Slot(size=size), self.num_prefix)
            size = slot.size
        return x, torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if size is None else size

    def extra_repr(self) -> str:
        """Settings, shown by print(module)."""
        return f"{self.config}, layer={self.layer}, num_prefix={self.num_prefix}"


class MergeBlock(nn.Module):
    """A pre-norm transformer block that merges tokens between its attention and its MLP.

    Args:
        dim: channels C.
        num_heads: attention heads.
        merge: the merging; its config's `metric` and `prop_attn` are honoured.
        mlp_ratio: hidden channels of the MLP per channel.
        dropout: rate after attention and MLP.

    Raises:
        ConfigError: if a number is out of range, heads do not divide the channels, or `merge` merges elsewhere.

    Example:
        >>> import torch, vtoken
        >>> block = vtoken.nn.MergeBlock(64, 4, vtoken.nn.MergeTokens(vtoken.ToMe(r=8), num_prefix=1))
        >>> x, size = block(torch.randn(2, 65, 64))[:2]
        >>> x.shape
        torch.Size([2, 57, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, merge: MergeTokens, *, mlp_ratio: float = 4.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        dim = checks.whole("MergeBlock", "dim", dim, 1)
        num_heads = checks.whole("MergeBlock", "num_heads", num_heads, 1)
        if not isinstance(merge, MergeTokens):
            raise ConfigError(f"MergeBlock(merge={merge!r}): must be a vtoken.nn.MergeTokens")
        mlp_ratio = checks.number("MergeBlock", "mlp_ratio", mlp_ratio, above=0)
        dropout = checks.number("MergeBlock", "dropout", dropout, 0, 1)
        if dim % num_heads:
            raise ConfigError(f"dim={dim} is not divisible by num_heads={num_heads}")
        if merge.config.place != "between":
            raise ConfigError(
                'MergeBlock merges between attention and MLP; for place="after" put MergeTokens behind a block'
            )
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.merge = merge
        self.norm2 = nn.LayerNorm(dim)
        hidden = max(1, int(dim * mlp_ratio))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, C] and sizes [B, T] (None: ones) -> tokens [B, T', C] and sizes [B, T'].

        Raises:
            ShapeError, InputError: if they do not fit the block or each other, or are no tensors.
        """
        checks.tensor("MergeBlock", "x", x)
        if x.dim() != 3 or x.shape[2] != self.qkv.in_features:
            raise ShapeError(f"x must be [B, T, {self.qkv.in_features}], got {tuple(x.shape)}")
        if size is not None and checks.tensor("MergeBlock", "size", size).shape != x.shape[:2]:
            raise ShapeError(f"size must be {list(x.shape[:2])}, got {tuple(size.shape)}")
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        biased = size is not None and self.merge._method.has_bias()
        bias = size_bias(size, q.dtype) if biased and size is not None else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(attended))
        metric = {"key": key_metric, "key_concat": lambda k: k.transpose(1, 2).flatten(2)}.get(self.merge.config.metric)
        x, size = self.merge(x, x if metric is None else metric(k), size)
        return x + self.dropout(self.mlp(self.norm2(x))), size
