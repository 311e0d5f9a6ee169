"""Merging as modules: MergeTokens (tokens, metric, sizes in; fewer out) and a transformer block around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtoken.core.errors import ConfigError, ShapeError
from vtoken.core.method import BlockMethod
from vtoken.core.state import Slot
from vtoken.methods.merging import MergeConfig
from vtoken.ops import key_metric, size_bias


class MergeTokens(nn.Module):
    """One merge as a layer without parameters; the very step that `vtoken.apply` puts into a block.

    Args:
        config: settings, e.g. `vtoken.PiToMe(ratio=0.9)`.
        layer: which block this is, for settings that change with depth (PiToMe's margin).
        depth: number of blocks of the network.
        num_prefix: leading tokens that never merge (class, registers).

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
        if not 0 <= layer < depth:
            raise ConfigError(f"layer={layer} is not one of depth={depth} layers")
        if layer > 0 and config.protected_patches():
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
        """
        if x.dim() != 3 or metric.shape[:2] != x.shape[:2]:
            raise ShapeError(
                f"x must be [B, T, C] and metric [B, T, d], got {tuple(x.shape)} and {tuple(metric.shape)}"
            )
        if self._method.num_removed(self.layer, x.shape[1] - self.num_prefix) > 0:
            x, slot = self._method.on_block(self.layer, x, metric, Slot(size=size), self.num_prefix)
            size = slot.size
        return x, torch.ones(x.shape[:2], device=x.device) if size is None else size

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
    """

    def __init__(
        self, dim: int, num_heads: int, merge: MergeTokens, *, mlp_ratio: float = 4.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
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
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, C] and sizes [B, T] (None: ones) -> tokens [B, T', C] and sizes [B, T']."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        biased = size is not None and self.merge._method.has_bias()
        bias = size_bias(size, q.dtype) if biased and size is not None else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(attended))
        metric = {"key": key_metric, "key_concat": lambda k: k.transpose(1, 2).flatten(2)}.get(self.merge.config.metric)
        x, size = self.merge(x, x if metric is None else metric(k), size)
        return x + self.dropout(self.mlp(self.norm2(x))), size
