"""transformers' vision encoder layers with tokens taken out between (or after) their two residual branches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vtoken.core.blocks import merged_block
from vtoken.core.bound import alone, changed
from vtoken.core.calling import call
from vtoken.core.patch import forward_with
from vtoken.core.state import TokenState
from vtoken.core.tap import Tap, TappedMixin
from vtoken.errors import InputError
from vtoken.hosts.attending import attending
from vtoken.hosts.tower import gather_rope
from vtoken.ops.merging.attention import masked_attention


class LayerMixin:
    """What the layers share; a subclass gives the two residual branches as `_vtoken_attn` and `_vtoken_mlp`."""

    _vtoken_index: int
    _vtoken_takes_mask = True

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vtoken_state: TokenState | None = None,
        **options: Any,
    ) -> Any:
        stock: Any = super().forward  # type: ignore[misc]
        if vtoken_state is None:
            alone(self)
            return stock(hidden_states, *([attention_mask] if self._vtoken_takes_mask else []), **options)
        run = functools.partial(self._vtoken_stock, stock)
        return merged_block(self, vtoken_state, hidden_states, run, attn_mask=attention_mask, **options)

    def _vtoken_stock(
        self: Any, stock: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, **options: Any
    ) -> Any:  # fmt: skip
        mask = self._vtoken_mask(x, attn_mask)
        if tap.row is not None or tap.acts_in(attention_of(self)):
            name = "self_attn" if hasattr(self, "self_attn") else "attention"
            attn = functools.partial(getattr(self, name), vtoken_tap=tap)
            # Checkpointing has begun outside; the host's forward would begin it again on a view of its own class.
            parts = {name: attn, "gradient_checkpointing": False}
            return forward_with(self, parts, x, mask, **options)
        return stock(x, mask, **options)

    def _vtoken_mask(self: Any, x: Tensor, attn_mask: Tensor | None) -> Tensor | None:
        """Sizes [B, 1, 1, T] as the mask [B, 1, T, T] that transformers wants; the host's own masks as they are."""
        if attn_mask is None or attn_mask.dim() != 4 or attn_mask.shape[2] == x.shape[1]:
            return attn_mask
        refuse_flash(attention_of(self).config)
        return attn_mask.expand(-1, -1, x.shape[1], -1)

    def _vtoken_attend(
        self: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:  # fmt: skip
        """Normed tokens [B, T, C] through the host's attention, its keys into the tap."""
        attn = attention_of(self)
        out: Tensor = tap.attend(attn, x, attention_mask=self._vtoken_mask(x, attn_mask), **options)[0]
        return out


class AttentionMixin(TappedMixin):
    """What the layers' attentions share: projections of their own for queries and keys, and a core called by name.

    That core may be an attention method's.
    """

    _vtoken_keys, _vtoken_queries = "k_proj", "q_proj"

    def forward(  # type: ignore[override]
        self: Any, hidden_states: Tensor, *args: Any, vtoken_tap: Tap | None = None, **options: Any
    ) -> Any:  # fmt: skip
        tap = Tap.acting(self, vtoken_tap, hidden_states.shape[1])
        if tap is None:
            return super().forward(hidden_states, *args, vtoken_tap=vtoken_tap, **options)
        parts = tap.parts(self, self._vtoken_keys, self._vtoken_queries)
        parts |= attending(self, functools.partial(_by_method, self, tap))
        return forward_with(self, parts, hidden_states, *args, **options)


def _by_method(
    attn: Any, tap: Tap, view: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float,
    dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function: the method that `attn` carries."""
    if mask is not None:
        if mask.stride(-2) == 0:  # one row for all queries
            mask = mask[..., :1, :]
        if mask.dtype != torch.bool:  # what eager attention calls masked is a finite number: no key may be left by it
            mask = mask.masked_fill(mask == torch.finfo(mask.dtype).min, -torch.inf)
    return tap.run(attn, q, k, v, scale=scaling, mask=mask, dropout=dropout).transpose(1, 2), None


class ClipLayerMixin(LayerMixin):
    """CLIP, SigLIP, SigLIP 2."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self._vtoken_attend(self.layer_norm1(x), tap, **attention)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.mlp(self.layer_norm2(x))


class ViTLayerMixin(LayerMixin):
    """ViT, DeiT."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self.dropout(self._vtoken_attend(self.layernorm_before(x), tap, **attention))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(x)))


class DinoLayerMixin(LayerMixin):
    """DINOv2 with and without registers."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self.drop_path(self.layer_scale1(self._vtoken_attend(self.norm1(x), tap, **attention)))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class PixioLayerMixin(LayerMixin):
    """Pixio: a ViT with stochastic depth."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self.drop_path(self.dropout(self._vtoken_attend(self.layernorm_before(x), tap, **attention)))

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.drop_path(self.dropout(self.mlp(self.layernorm_after(x))))


class Aimv2LayerMixin(LayerMixin):
    """AIMv2."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self._vtoken_attend(self.rms_norm1(x), tap, **attention)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.ffn(self.rms_norm2(x))


class RotaryLayerMixin(LayerMixin):
    """Attention turns patches by a table, from which merged tokens take the row of their anchor.

    The table travels as one tensor, cosines next to sines, so that `vtoken.compile` knows its rows.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        vtoken_state: TokenState | None = None,
        **options: Any,
    ) -> Any:
        if vtoken_state is None:
            options["position_embeddings"] = position_embeddings
        elif position_embeddings is not None:
            vtoken_state.enter(self._vtoken_index, hidden_states)
            table, slot = torch.cat(position_embeddings, dim=-1), vtoken_state.slots[self._vtoken_index]
            options["rope"] = gather_rope(table, slot, vtoken_state.num_prefix)
        return super().forward(hidden_states, attention_mask, vtoken_state=vtoken_state, **options)

    def _vtoken_stock(
        self: Any, stock: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, **options: Any
    ) -> Any:  # fmt: skip
        return super()._vtoken_stock(stock, x, tap, attn_mask, **self._vtoken_turned(**options))

    def _vtoken_attend(
        self: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:  # fmt: skip
        out: Tensor = super()._vtoken_attend(x, tap, attn_mask, **self._vtoken_turned(**options))
        return out

    def _vtoken_turned(self, rope: Tensor | None = None, **options: Any) -> dict[str, Any]:
        """The host's own argument for a table [..., N, 2D]."""
        return options if rope is None else {**options, "position_embeddings": rope.chunk(2, dim=-1)}


class RotaryDinoLayerMixin(RotaryLayerMixin, DinoLayerMixin):
    """DINOv3."""


class PixtralLayerMixin(RotaryLayerMixin):
    """Pixtral, one image: the table has no dimension for a batch."""

    def _vtoken_turned(self, rope: Tensor | None = None, **options: Any) -> dict[str, Any]:
        return super()._vtoken_turned(rope if rope is None else rope.flatten(0, -2), **options)

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self._vtoken_attend(self.attention_norm(x), tap, **attention)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.feed_forward(self.ffn_norm(x))


class MasklessLayerMixin(LayerMixin):
    """Layers whose nested attention takes no mask, so sizes are added here."""

    _vtoken_takes_mask = False

    def _vtoken_stock(
        self: Any, stock: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, **options: Any
    ) -> Any:  # fmt: skip
        if attn_mask is None:
            return stock(x, **options)
        x = x + self._vtoken_attn(x, tap, attn_mask=attn_mask)
        return x + self._vtoken_mlp(x)

    def _vtoken_attend(
        self: Any, x: Tensor, tap: Tap, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:  # fmt: skip
        if not getattr(self.attention, "_vtoken_takes_tap", False):
            raise changed(f"the attention of block {self._vtoken_index}", self.attention)
        out: Tensor = self.attention(x, vtoken_tap=tap, vtoken_mask=attn_mask)
        return out


class MasklessDinoLayerMixin(MasklessLayerMixin, DinoLayerMixin):
    """DINOv2 as in transformers 5.17."""


class VideoMaeLayerMixin(MasklessLayerMixin):
    """VideoMAE: what ends the MLP adds the residual itself."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self._vtoken_attend(self.layernorm_before(x), tap, **attention)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.output(self.intermediate(self.layernorm_after(x)), x.new_zeros(()))


class VitPoseLayerMixin(MasklessLayerMixin):
    """ViTPose without experts."""

    def _vtoken_attn(self: Any, x: Tensor, tap: Tap, **attention: Any) -> Tensor:
        return self._vtoken_attend(self.layernorm_before(x), tap, **attention)

    def _vtoken_mlp(self: Any, x: Tensor) -> Tensor:
        return self.mlp(self.layernorm_after(x))


class NestedAttentionMixin:
    """The attention of a maskless layer: it holds one that projects, and takes no mask."""

    _vtoken_takes_tap = True

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        vtoken_tap: Tap | None = None,
        vtoken_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if vtoken_tap is None:
            return super().forward(hidden_states, *args, **options)  # type: ignore[misc]
        inner = self.attention
        core = functools.partial(call, inner, functools.partial(_nested, inner, vtoken_tap, vtoken_mask))
        return forward_with(self, {"attention": core}, hidden_states)


def _nested(attn: Any, tap: Tap, mask: Tensor | None, x: Tensor) -> tuple[Tensor, None]:
    """The inner attention of a maskless layer with a mask; its keys go to the tap."""
    heads = (attn.num_attention_heads, attn.attention_head_size)
    q, k, v = (part(x).unflatten(2, heads).transpose(1, 2) for part in (attn.query, attn.key, attn.value))
    tap.keys = k
    out = masked_attention(q, k, v, mask, dropout_p=attn.dropout_prob if attn.training else 0.0)
    return out.transpose(1, 2).flatten(2), None


def attention_of(layer: Any) -> Any:
    """The attention module of a layer."""
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def refuse_flash(config: Any) -> None:
    """Raise InputError if the attention chosen in `config` takes no bias on its logits."""
    name = str(getattr(config, "_attn_implementation", None))
    if "flash" in name:
        raise InputError(
            f"token sizes enter attention as a bias on the logits, which {name!r} does not take; use "
            "model.set_attn_implementation('sdpa') or settings with prop_attn=False"
        )
