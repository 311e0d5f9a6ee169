"""timm's transformer blocks with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn.modules import module as _module

from vtoken.core.errors import InputError
from vtoken.core.method import AttentionMethod
from vtoken.core.patch import base_of, view, view_as
from vtoken.core.state import TokenState
from vtoken.hosts.tower import Tap, gather_rope, given, merged_block, stock_with
from vtoken.ops.attention import is_bias_per_key, masked_attention
from vtoken.ops.backend import use_triton


def through(module: Any, x: Tensor) -> Tensor:
    """`module(x)`, without the call where it is an identity that nobody listens to."""
    if type(module) is nn.Identity and not (module._forward_hooks or module._forward_pre_hooks or _global_hooks()):
        return x
    result: Tensor = module(x)
    return result


def _global_hooks() -> bool:
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


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
        if vtoken_state is None:  # called outside a patched model
            return stock(x, **attention)
        return merged_block(self, vtoken_state, x, functools.partial(self._vtoken_stock, stock), **attention)

    def _vtoken_stock(self: Any, stock: Any, x: Tensor, tap: Tap, **attention: Any) -> Any:
        attn = with_sizes(self.attn, self.attn, x, tap, **attention)
        if attn is self.attn:
            return stock_with(self, stock, "attn", "k_norm", x, tap, **attention)
        return view(self, attn=attn).forward(x, **attention)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        own = self._modules
        attn = tap.on(own["attn"], "k_norm")
        if attention:
            attn = with_sizes(own["attn"], attn, x, tap, **attention)
        return through(own["drop_path1"], through(own["ls1"], attn(own["norm1"](x), **attention)))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        own = self._modules
        return through(own["drop_path2"], through(own["ls2"], own["mlp"](own["norm2"](x))))


class ResPostBlockMixin(BlockMixin):
    """timm `ResPostBlock`: norms at the end of the branches."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        attn = with_sizes(self.attn, tap.on(self.attn, "k_norm"), x, tap, **attention)
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

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            call = tap.call(self.scale, attn_mask, self.attn_drop.p if self.training else 0.0)
            out = self._vtoken_method.attend(q, k, v, self.predictor, call)
            tap.done(call, k)
            return out

        return around(self, core, x)


def around(attn: Any, core: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """timm's `Attention` with another core; projections, norms and gate stay the host's."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    out = attn.norm(core(attn.q_norm(q), attn.k_norm(k), v).transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)  # older versions of timm have none
    if gate is not None:
        out = out * gate(x).sigmoid()
    projected: Tensor = attn.proj_drop(attn.proj(out))
    return projected


class SizedAttention(Attention):
    """What stands in for timm's `Attention` during a call with token sizes that kernels may add."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, T, C] with a bias per key [B, 1, 1, T] attend to themselves."""
        dropout = self.attn_drop.p if self.training else 0.0
        return around(self, functools.partial(masked_attention, mask=attn_mask, dropout_p=dropout), x)


def with_sizes(
    host: Any, attn: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Any:  # fmt: skip
    """What is called for the block's attention `host`: `attn`, or a stand-in whose core kernels serve.

    The host's own call takes sizes as a mask, which keeps fused attention but not its fastest kernel. A mask of the
    caller's stays the host's: with nothing merged, every bit is as it was.
    """
    if attn_mask is None or not use_triton("auto", x, lambda: ""):
        return attn
    own = base_of(type(host)).forward is Attention.forward  # type: ignore[attr-defined]
    if is_causal or not own or not host.fused_attn or tap.acts_in(host):
        return attn
    if not tap.has_sizes or not is_bias_per_key(attn_mask):
        return attn
    return view_as(SizedAttention, attn)


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
