"""timm's transformer blocks with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor

from vtoken.core.blocks import merged_block
from vtoken.core.bound import alone
from vtoken.core.calling import through
from vtoken.core.method import AttentionMethod
from vtoken.core.patch import base_of, forward_with
from vtoken.core.state import TokenState
from vtoken.core.tap import Tap, TappedMixin, stock_with, tapped_forward
from vtoken.errors import InputError
from vtoken.hosts.tower import Mixins, gather_rope, given
from vtoken.ops import backend
from vtoken.ops.merging.attention import is_bias_per_key, masked_attention


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
        attention = {} if attn_mask is None and not is_causal else given(attn_mask=attn_mask, is_causal=is_causal)
        if vtoken_state is None:
            alone(self)
            return stock(x, **attention)
        return merged_block(self, vtoken_state, x, functools.partial(self._vtoken_stock, stock), **attention)

    def _vtoken_stock(self: Any, stock: Any, x: Tensor, tap: Tap, **attention: Any) -> Any:
        if attention and adds_sizes(self.attn, x, tap, **attention):
            return tapped_forward(self, "attn", tap, x, **attention)
        return stock_with(self, stock, "attn", x, tap, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        own = self._modules
        out = tap.attend(own["attn"], own["norm1"](x), **attention)
        return through(own["drop_path1"], through(own["ls1"], out))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        own = self._modules
        return through(own["drop_path2"], through(own["ls2"], own["mlp"](own["norm2"](x))))


class ResPostBlockMixin(BlockMixin):
    """timm `ResPostBlock`: norms at the end of the branches."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self.drop_path1(self.norm1(tap.attend(self.attn, x, **attention)))

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
        if vtoken_state is None:
            alone(self)
            return stock(x, **attention)
        run = functools.partial(stock_with, self, stock, "attn")
        return merged_block(self, vtoken_state, x, run, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        out = tap.attend(self.attn, self.norm1(x), **attention)
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class EvaBlockPostNormMixin(EvaBlockMixin):
    """timm `EvaBlockPostNorm`."""

    _vtoken_attn = ResPostBlockMixin._vtoken_attn
    _vtoken_mlp = ResPostBlockMixin._vtoken_mlp


class AttentionMixin:
    """timm `Attention` that shows its keys, and whose core may be an attention method's.

    Projections, norms and gate stay the host's.
    """

    _vtoken_takes_tap: ClassVar[bool] = True
    _vtoken_adds_sizes: ClassVar[bool] = True

    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        vtoken_tap: Tap | None = None,
    ) -> Tensor:
        method: AttentionMethod | None = self.__dict__.get("_vtoken_method")
        if vtoken_tap is None:
            if method is None or method.is_stock(self._vtoken_index):
                return super().forward(x, **given(attn_mask=attn_mask, is_causal=is_causal))  # type: ignore[misc]
            tap = Tap.alone(self, x.shape[1])
        else:
            tap = vtoken_tap
        if vtoken_tap is None or (method is not None and tap.acts_in(self)):
            if is_causal:
                raise InputError("is_causal=True cannot be combined with a connectivity mask; use vtoken.remove(model)")
            return around(self, functools.partial(_method_core, self, tap, attn_mask), x)
        if not self.fused_attn:
            read = tap.parts(self, "k_norm", "q_norm")
            return forward_with(self, read, x, **given(attn_mask=attn_mask, is_causal=is_causal))
        dropout = self.attn_drop.p if self.training else 0.0
        if attn_mask is not None and adds_sizes(self, x, tap, attn_mask, is_causal):
            core: Core = functools.partial(masked_attention, mask=attn_mask, dropout_p=dropout)
        else:
            core = functools.partial(
                F.scaled_dot_product_attention, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal
            )
        return around(self, core, x, tap)


Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def _method_core(attn: Any, tap: Tap, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What an attention method does with queries, keys and values."""
    call = tap.call(attn.scale, mask, attn.attn_drop.p if attn.training else 0.0)
    out: Tensor = attn._vtoken_method.attend(q, k, v, attn.predictor, call)
    tap.done(call, k)
    return out


def around(attn: Any, core: Core, x: Tensor, tap: Tap | None = None) -> Tensor:
    """timm's `Attention` with another core; projections, norms and gate stay the host's. A tap is left the keys."""
    own = attn._modules
    shape = (*x.shape[:2], 3, attn.num_heads, attn.head_dim)
    q, k, v = own["qkv"](x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = through(own["q_norm"], q), through(own["k_norm"], k)
    if tap is not None and tap.wants_keys:
        tap.keys = k
    out = through(own["norm"], core(q, k, v).transpose(1, 2).flatten(2))
    gate = own.get("gate")  # older versions of timm have none
    if gate is not None:
        out = out * gate(x).sigmoid()
    return through(own["proj_drop"], own["proj"](out))


def adds_sizes(
    attn: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, is_causal: bool = False, **rotary: Any
) -> bool:
    """Whether kernels add the mask of a block's attention, the term of token sizes, to the logits.

    The host's own call takes sizes as a mask, which keeps fused attention but not its fastest kernel. A mask of the
    caller's stays the host's: with nothing merged, every bit is as it was.
    """
    if attn_mask is None or rotary or not (x.is_cuda or backend.FORCED) or not backend.use_triton("auto", x, str):
        return False
    own = base_of(type(attn)).forward is Attention.forward  # type: ignore[attr-defined]
    if is_causal or not own or not attn.fused_attn or tap.acts_in(attn):
        return False
    return tap.has_sizes and is_bias_per_key(attn_mask)


#: Mixin of every supported block class. Subclasses count if they leave `forward` alone.
BLOCKS = Mixins(
    {
        Block: BlockMixin,
        ResPostBlock: ResPostBlockMixin,
        EvaBlock: EvaBlockMixin,
        EvaBlockPostNorm: EvaBlockPostNormMixin,
    }
)
#: Attention classes whose forward calls `k_norm` on [B, H, T, D] keys before any rotation.
ATTENTIONS: tuple[type, ...] = (Attention, AttentionRope, EvaAttention)
#: Their mixins.
ATTENTION_MIXINS = Mixins({Attention: AttentionMixin, AttentionRope: TappedMixin, EvaAttention: TappedMixin})
#: Attention classes whose core an attention method may replace.
SPARSE: tuple[type, ...] = (Attention,)


def parts(block: Any) -> tuple[type, Any, type]:
    """The mixin of a block, its attention and the mixin of that."""
    return BLOCKS[type(block)], block.attn, ATTENTION_MIXINS[type(block.attn)]
