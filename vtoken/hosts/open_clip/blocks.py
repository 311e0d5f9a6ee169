"""open_clip's blocks and attentions with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
)
from torch import Tensor, nn

from vtoken.core.blocks import merged_block
from vtoken.core.bound import alone, changed
from vtoken.core.calling import through
from vtoken.core.method import AttentionMethod
from vtoken.core.patch import base_of, forward_with, is_patched
from vtoken.core.state import TokenState
from vtoken.core.tap import Tap, TappedMixin, stock_with
from vtoken.errors import InputError
from vtoken.hosts.tower import Mixins
from vtoken.ops import size_bias
from vtoken.ops.merging.attention import masked_attention


class BlockMixin:
    """`ResidualAttentionBlock`: nn.MultiheadAttention with packed weights, batch first or not."""

    _vtoken_index: int

    def forward(
        self: Any,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        vtoken_state: TokenState | None = None,
    ) -> Tensor:
        stock: Any = super().forward  # type: ignore[misc]
        if vtoken_state is None:
            alone(self)
            return stock(q_x, k_x, v_x, attn_mask)
        if self.attn.batch_first:
            return merged_block(self, vtoken_state, q_x, functools.partial(self._vtoken_stock, stock))
        rows = merged_block(self, vtoken_state, q_x.transpose(0, 1), functools.partial(self._vtoken_stock, stock))
        return rows.transpose(0, 1).contiguous()

    def _vtoken_stock(self: Any, stock: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None) -> Tensor:
        """A block that removes nothing: the host's own forward while that is exact to the bit."""
        if attn_mask is not None or tap.acts_in(self.attn):
            x = x + self._vtoken_attn(x, tap, attn_mask=attn_mask)
            return x + self._vtoken_mlp(x)
        rows: Tensor = stock(x if self.attn.batch_first else x.transpose(0, 1))
        return rows if self.attn.batch_first else rows.transpose(0, 1)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None) -> Tensor:
        attn = self.attn
        if not is_patched(plain_attention(attn) or attn):
            raise changed(f"the attention of block {self._vtoken_index}", attn)
        x = self.ln_1(x)
        rows = x if attn.batch_first else x.transpose(0, 1)
        out = attn(rows, rows, rows, need_weights=False, vtoken_tap=tap, vtoken_mask=attn_mask)[0]
        return through(self.ls_1, out if attn.batch_first else out.transpose(0, 1))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return through(self.ls_2, self.mlp(self.ln_2(x)))


class CustomBlockMixin:
    """`CustomResidualAttentionBlock`: open_clip's own Attention (q/k norm, head scale, inner norm)."""

    _vtoken_index: int

    def forward(
        self: Any, x: Tensor, *unused: None, attn_mask: Tensor | None = None, vtoken_state: TokenState | None = None
    ) -> Tensor:
        stock: Any = super().forward  # type: ignore[misc]
        if vtoken_state is None:
            alone(self)
            return stock(x, attn_mask=attn_mask)
        return merged_block(self, vtoken_state, x, functools.partial(stock_with, self, stock, "attn"))

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None) -> Tensor:
        return self.ls_1(self.ln_attn(tap.attend(self.attn, self.ln_1(x), attn_mask=attn_mask)))

    _vtoken_mlp = BlockMixin._vtoken_mlp


def packed_attention(attn: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None) -> Tensor:
    """Self-attention [B, T, C] with the packed weights of `nn.MultiheadAttention`, kept fused; its keys go to the tap.

    nn.MultiheadAttention itself would expand a mask to every head and query, and gives no keys.
    """
    packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = packed.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    dropout = attn.dropout if attn.training else 0.0
    if tap.wants_keys:
        tap.keys = k
    if tap.acts_in(attn):
        out = tap.run(attn, q, k, v, scale=attn.head_dim**-0.5, mask=attn_mask, dropout=dropout)
    else:
        out = masked_attention(q, k, v, attn_mask, dropout_p=dropout)
    projected: Tensor = attn.out_proj(out.transpose(1, 2).flatten(2))
    return projected


def plain_attention(attn: Any) -> nn.MultiheadAttention | None:
    """The attention itself, or the one inside peft's LoRA layer; None if it computes something else."""
    if type(attn).__module__.startswith("peft.tuners.lora"):
        attn = attn.base_layer
    # Not the class: parametrizations and FSDP2 subclass it.
    return attn if base_of(type(attn)).forward is nn.MultiheadAttention.forward else None  # type: ignore[attr-defined]


class PackedMixin:
    """nn.MultiheadAttention that shows its keys in a patched tower, and whose core may be an attention method's."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        vtoken_tap: Tap | None = None,
        vtoken_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        method: AttentionMethod | None = self.__dict__.get("_vtoken_method")
        if vtoken_tap is None:
            if method is None or method.is_stock(self._vtoken_index):
                return super().forward(query, key, value, *args, **options)  # type: ignore[misc]
            given = [name for name, value in options.items() if value is not None and name not in _IGNORED]
            if query is not key or key is not value or args or given or options.get("need_weights", True):
                raise InputError(
                    "attention with a connectivity mask is self-attention with need_weights=False and no mask"
                )
        x = query if self.batch_first else query.transpose(0, 1)
        tap = Tap.alone(self, x.shape[1]) if vtoken_tap is None else vtoken_tap
        if tap.may_keep_all and vtoken_mask is None and not tap.acts_in(self):
            # nn.MultiheadAttention's own kernels round otherwise than ours, and give no keys: those are made again.
            if tap.wants_keys:
                width = slice(self.embed_dim, 2 * self.embed_dim)
                bias = None if self.in_proj_bias is None else self.in_proj_bias[width]
                keys = F.linear(x, self.in_proj_weight[width], bias)
                tap.keys = keys.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            return super().forward(query, key, value, *args, **options)  # type: ignore[misc]
        out = packed_attention(self, x, tap, vtoken_mask)
        return (out if self.batch_first else out.transpose(0, 1)), None


class OwnAttentionMixin(TappedMixin):
    """open_clip's own `Attention`."""

    _vtoken_keys, _vtoken_queries = "ln_k", "ln_q"


class PoolMixin:
    """`AttentionalPooler` over tokens that merged."""

    def forward(self: Any, x: Tensor, vtoken_size: Tensor | None = None) -> Any:
        if vtoken_size is None:
            return super().forward(x)  # type: ignore[misc]
        # A float key_padding_mask [B, T] is added to the logits of the keys.
        bias = size_bias(vtoken_size, x.dtype)[:, 0, 0]
        attn = functools.partial(self.attn, key_padding_mask=bias)
        return forward_with(self, {"attn": attn}, x)


_IGNORED = ("need_weights", "average_attn_weights")
ATTENTION_MIXINS = Mixins({nn.MultiheadAttention: PackedMixin, Attention: OwnAttentionMixin})
BLOCKS = Mixins({ResidualAttentionBlock: BlockMixin, CustomResidualAttentionBlock: CustomBlockMixin})


def parts(block: Any) -> tuple[type, Any, type]:
    """The mixin of a block, its attention, also inside peft's LoRA layer, and the mixin of that."""
    attn = plain_attention(block.attn) or block.attn
    return BLOCKS[type(block)], attn, ATTENTION_MIXINS[type(attn)]
