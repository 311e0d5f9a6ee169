"""timm's transformer blocks with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

import functools
from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor

from vtoken.core.errors import InputError
from vtoken.core.method import AttentionMethod
from vtoken.core.state import TokenState
from vtoken.hosts.tower import Tap, gather_rope, given, merged_block, stock_with


class BlockMixin:
    """timm `Block`: pre-norm, layer scale."""

    _vtoken_index: int

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        vtoken_state: TokenState | None = None,
    ) -> Tensor:
        stock: Any = super().forward  # type: ignore[misc]
        attention = given(attn_mask=attn_mask, is_causal=is_causal)
        if vtoken_state is None:  # called outside a patched model
            return stock(x, **attention)
        run = functools.partial(stock_with, self, stock, "attn", "k_norm")
        return merged_block(self, vtoken_state, x, run, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        attn = tap.on(self.attn, "k_norm")
        return self.drop_path1(self.ls1(attn(self.norm1(x), **attention)))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ResPostBlockMixin(BlockMixin):
    """timm `ResPostBlock`: norms at the end of the branches."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        attn = tap.on(self.attn, "k_norm")
        return self.drop_path1(self.norm1(attn(x, **attention)))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


class EvaBlockMixin:
    """timm `EvaBlock`: layer scale as raw parameters, rotary positions."""

    _vtoken_index: int

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        vtoken_state: TokenState | None = None,
    ) -> Tensor:
        stock: Any = super().forward  # type: ignore[misc]
        if vtoken_state is not None and rope is not None:
            vtoken_state.enter(self._vtoken_index, x)
            rope = gather_rope(rope, vtoken_state.slots[self._vtoken_index], vtoken_state.num_prefix)
        attention = given(rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        if vtoken_state is None:  # called outside a patched model
            return stock(x, **attention)
        run = functools.partial(stock_with, self, stock, "attn", "k_norm")
        return merged_block(self, vtoken_state, x, run, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        attn = tap.on(self.attn, "k_norm")
        out = attn(self.norm1(x), **attention)
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class EvaBlockPostNormMixin(EvaBlockMixin):
    """timm `EvaBlockPostNorm`."""

    _vtoken_attn = ResPostBlockMixin._vtoken_attn
    _vtoken_mlp = ResPostBlockMixin._vtoken_mlp


class AttentionMixin:
    """timm `Attention` whose core is an attention method's; projections, norms and gate stay the host's."""

    _vtoken_method: AttentionMethod
    _vtoken_index: int

    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        vtoken_tap: Tap | None = None,
    ) -> Tensor:
        if vtoken_tap is None and self._vtoken_method.is_stock(self._vtoken_index):
            return super().forward(x, **given(attn_mask=attn_mask, is_causal=is_causal))  # type: ignore[misc]
        if is_causal:
            raise InputError("is_causal=True cannot be combined with a connectivity mask; use vtoken.remove(model)")
        tap = Tap.alone(self, x.shape[1]) if vtoken_tap is None else vtoken_tap
        heads = (3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).unflatten(2, heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        call = tap.call(self.scale, attn_mask, self.attn_drop.p if self.training else 0.0)
        out = self._vtoken_method.attend(q, k, v, self.predictor, call)
        tap.done(call, k)
        out = self.norm(out.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)  # older versions of timm have none
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


#: Mixin of every supported block class. Subclasses count if they leave `forward` alone.
BLOCKS: dict[type, type] = {
    Block: BlockMixin,
    ResPostBlock: ResPostBlockMixin,
    EvaBlock: EvaBlockMixin,
    EvaBlockPostNorm: EvaBlockPostNormMixin,
}
#: Attention classes whose forward calls `k_norm` on [B, H, T, D] keys before any rotation.
ATTENTIONS: tuple[type, ...] = (Attention, AttentionRope, EvaAttention)
#: Mixin of every attention class whose core an attention method may replace.
ATTENTION_MIXINS: dict[type, type] = {Attention: AttentionMixin}
