"""timm's transformer blocks with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor

from vtoken.core.state import TokenState
from vtoken.hosts.tower import Tap, gather_rope, given, merged_block


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
        return merged_block(self, vtoken_state, x, stock, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap | None, **attention: Any) -> Tensor:
        attn = self.attn if tap is None else tap.on(self.attn, "k_norm")
        return self.drop_path1(self.ls1(attn(self.norm1(x), **attention)))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ResPostBlockMixin(BlockMixin):
    """timm `ResPostBlock`: norms at the end of the branches."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap | None, **attention: Any) -> Tensor:
        attn = self.attn if tap is None else tap.on(self.attn, "k_norm")
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
        return merged_block(self, vtoken_state, x, stock, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap | None, **attention: Any) -> Tensor:
        attn = self.attn if tap is None else tap.on(self.attn, "k_norm")
        out = attn(self.norm1(x), **attention)
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class EvaBlockPostNormMixin(EvaBlockMixin):
    """timm `EvaBlockPostNorm`."""

    _vtoken_attn = ResPostBlockMixin._vtoken_attn
    _vtoken_mlp = ResPostBlockMixin._vtoken_mlp


#: Mixin of every supported block class. Subclasses count if they leave `forward` alone.
BLOCKS: dict[type, type] = {
    Block: BlockMixin,
    ResPostBlock: ResPostBlockMixin,
    EvaBlock: EvaBlockMixin,
    EvaBlockPostNorm: EvaBlockPostNormMixin,
}
#: Attention classes whose forward calls `k_norm` on [B, H, T, D] keys before any rotation.
ATTENTIONS: tuple[type, ...] = (Attention, AttentionRope, EvaAttention)
