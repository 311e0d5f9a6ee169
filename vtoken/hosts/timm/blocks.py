"""timm's transformer blocks with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor

from vtoken.core.blocks import merged_block
from vtoken.core.bound import alone
from vtoken.core.calling import through
from vtoken.core.patch import base_of, forward_with
from vtoken.core.state import TokenState
from vtoken.core.tap import Tap, TappedMixin, stock_with, tapped_forward
from vtoken.core.watch import Rotation
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
        tap = vtoken_tap
        if "_vtoken_method" in self.__dict__:
            acting = Tap.acting(self, tap, x.shape[1])
            if acting is not None:
                return by_method(self, acting, x, attn_mask, is_causal)
        if tap is None:
            return super().forward(x, **given(attn_mask=attn_mask, is_causal=is_causal))  # type: ignore[misc]
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


class RotaryMixin(TappedMixin):
    """timm's `AttentionRope` and `EvaAttention`, whose core may be an attention method's."""

    def forward(  # type: ignore[override]
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        vtoken_tap: Tap | None = None,
    ) -> Tensor:
        acting = Tap.acting(self, vtoken_tap, x.shape[1])
        if acting is not None:
            return by_method(self, acting, x, attn_mask, is_causal, rope)
        options = given(rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        rows: Tensor = super().forward(x, vtoken_tap=vtoken_tap, **options)
        return rows


Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_method(
    attn: Any, tap: Tap, x: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None = None
) -> Tensor:
    """An attention whose core is that of the method which it carries."""
    if is_causal:
        raise InputError("is_causal=True cannot be combined with a connectivity mask; use vtoken.remove(model)")
    dropout = attn.attn_drop.p if attn.training else 0.0
    core = functools.partial(tap.run, attn, scale=attn.scale, mask=attn_mask, dropout=dropout)
    return around(attn, core, x, tap, rope)


def around(attn: Any, core: Core, x: Tensor, tap: Tap, rope: Tensor | None = None) -> Tensor:
    """timm's attentions with another core; the rest stays the host's. The tap is left the keys, not yet rotated."""
    own = attn._modules
    q, k, v = _projected(attn, x)
    q, k = through(own["q_norm"], q), through(own["k_norm"], k)
    if tap.wants_keys:
        tap.keys = k
    if rope is not None:
        q, k = (rows.type_as(v) for rows in rotation(attn, rope)(q, k))
    if k.shape[1] != q.shape[1]:  # grouped queries
        k, v = (rows.repeat_interleave(q.shape[1] // rows.shape[1], dim=1) for rows in (k, v))
    out = through(own["norm"], core(q, k, v).transpose(1, 2).flatten(2))
    gate = own.get("gate")  # older versions of timm have none
    if gate is not None:
        out = out * gate(x).sigmoid()
    return through(own["proj_drop"], own["proj"](out))


def _projected(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, H, T, D] of normed tokens [B, T, C]; keys and values may have fewer heads."""
    own = attn._modules
    if own.get("qkv") is None:
        each = (own[name](x) for name in ("q_proj", "k_proj", "v_proj"))
        return tuple(rows.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for rows in each)
    packed = own["qkv"](x)
    bias = attn.q_bias if isinstance(attn, EvaAttention) else None
    if bias is not None:  # it keeps the biases of its packed projection by themselves
        packed = packed + torch.cat([bias, attn.k_bias, attn.v_bias]).to(packed.dtype)
    return packed.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def rotation(attn: Any, rope: Tensor) -> Rotation:
    """How an attention rotates queries and keys by a table, in timm's own way: prefix tokens have no place."""
    prefix, half = int(attn.num_prefix_tokens), bool(getattr(attn, "rotate_half", False))

    def turned(x: Tensor) -> Tensor:
        patches = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat([x[:, :, :prefix], patches], dim=2).type_as(x)

    return lambda q, k: (turned(q), turned(k))


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
ATTENTION_MIXINS = Mixins({Attention: AttentionMixin, AttentionRope: RotaryMixin, EvaAttention: RotaryMixin})


def parts(block: Any) -> tuple[type, Any, type]:
    """The mixin of a block, its attention and the mixin of that."""
    return BLOCKS[type(block)], block.attn, ATTENTION_MIXINS[type(block.attn)]
