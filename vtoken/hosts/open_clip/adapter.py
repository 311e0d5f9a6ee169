"""open_clip: the image tower of a CLIP, CustomTextCLIP or CoCa, or the tower itself; built-in ViTs and timm trunks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from vtoken.core.blocks import merged_block
from vtoken.core.bound import alone, bound, changed
from vtoken.core.calling import through
from vtoken.core.forward import block_method, forward_of
from vtoken.core.host import HostAdapter, find_adapter
from vtoken.core.method import AttentionMethod, Method
from vtoken.core.patch import base_of, forward_is_replaced, forward_with, is_patched, view
from vtoken.core.slots import Slot
from vtoken.core.spec import HostSpec, PatchSpec
from vtoken.core.state import TokenState
from vtoken.core.tap import Tap, TappedMixin, stock_with
from vtoken.core.trace import DROPPED
from vtoken.core.watch import Watch
from vtoken.errors import InputError, ShapeError, UnsupportedModelError
from vtoken.hosts.open_clip.masked import patch_spec, run_masked
from vtoken.hosts.open_clip.watched import run_watched
from vtoken.hosts.pooling import weighted_mean
from vtoken.hosts.tower import block_targets, mixin_for
from vtoken.ops import size_bias
from vtoken.ops.merging.attention import masked_attention
from vtoken.ops.rows import take_rows

NUM_PREFIX = 1  # every built-in tower has exactly one class token


class OpenClipTowerMixin:
    """The entry methods of a patched image tower."""

    _vtoken: Any

    def forward(self: Any, x: Tensor) -> Any:
        # Token rows leave the tower with output_tokens or without pooling; then in raster order.
        raster = self.output_tokens or self.pool_type == "none"
        whole = isinstance(self.patch_dropout, nn.Identity) or not self.training
        num_tokens = self.positional_embedding.shape[0] if whole else None
        with _forward_of(self, x, raster=raster) as state:
            transformer = BoundTransformer(self.transformer, state, raster=raster, num_tokens=num_tokens)
            return base_of(type(self)).forward(_stand_in(self, transformer), x)  # type: ignore[attr-defined]

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> Any:
        dense = output_fmt == "NCHW"
        with _forward_of(self, x, raster=True, dense=dense) as state:
            transformer = BoundTransformer(self.transformer, state, raster=True, dense=dense)
            return base_of(type(self)).forward_intermediates(  # type: ignore[attr-defined]
                _stand_in(self, transformer), x, indices, stop_early, normalize_intermediates, intermediates_only,
                output_fmt, output_extra_tokens,
            )  # fmt: skip


class BoundTransformer:
    """Stands where a tower's `transformer` stood, for one forward.

    Args:
        transformer: the tower's.
        state: of this forward.
        raster: hand tokens out in raster order. Not whenever anchors are known: a trace must not reorder a sum.
        dense: hand intermediates out spread over all patches.
        num_tokens: how many there always are; None if patch dropout changes it.
    """

    def __init__(
        self, transformer: Any, state: TokenState, *, raster: bool, dense: bool = False, num_tokens: int | None = None
    ) -> None:
        if not is_patched(transformer):
            raise changed("the transformer", transformer)
        self._transformer = transformer
        self._state = state
        self._raster = raster and state.method.order == "raster"
        self._dense = dense
        self._num_tokens = num_tokens
        #: What is known of the rows that were handed out.
        self.slot = Slot()

    def __call__(self, x: Tensor) -> Tensor:
        if self._num_tokens is not None and torch.compiler.is_compiling():
            # compile(dynamic=True) makes symbols of the image's sides; token counts as terms of those take minutes.
            x = x.narrow(1, 0, self._num_tokens)
        return self._finish(self._transformer(x, vtoken_state=self._state))

    def forward_intermediates(self, x: Tensor, indices: Any = None, stop_early: bool = False) -> Any:
        from timm.models._features import feature_take_indices

        inner = view(self._transformer, **_with_state(self._transformer, self._state))
        layers = sorted(set(feature_take_indices(len(inner.resblocks), indices)[0]))
        x, found = inner.forward_intermediates(x, indices=indices, stop_early=stop_early)
        slots = [self._state.slots[layer + 1] for layer in layers]
        # The host reshapes what it gets to its patch grid, so it must get every patch.
        hand_out = self._spread if self._dense else self._ordered
        found = [hand_out(rows, slot) for rows, slot in zip(found, slots, strict=True)]
        return self._finish(x), found

    def _finish(self, x: Tensor) -> Tensor:
        self.slot = self._state.last
        if self._raster:
            x, self.slot = self.slot.in_raster_order(x)
        return x

    def _ordered(self, rows: Tensor, slot: Slot) -> Tensor:
        return slot.in_raster_order(rows)[0] if self._raster else rows

    def _spread(self, rows: Tensor, slot: Slot) -> Tensor:
        if slot.dropped:
            raise ShapeError(DROPPED)
        return rows if slot.dest is None else take_rows(rows, slot.dest)


class TransformerMixin:
    """`Transformer`: the list of blocks."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, vtoken_state: TokenState | None = None
    ) -> Tensor:
        if vtoken_state is None:
            return super().forward(x, attn_mask)  # type: ignore[misc]
        return forward_with(self, _with_state(self, vtoken_state), x, attn_mask)


def _with_state(transformer: Any, state: TokenState) -> dict[str, Any]:
    return {"resblocks": bound(transformer.resblocks, state)}


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
        if not is_patched(_plain_attention(attn) or attn):
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


def packed_attention(attn: Any, x: Tensor, tap: Tap | None, attn_mask: Tensor | None) -> Tensor:
    """Self-attention [B, T, C] with the packed weights of `nn.MultiheadAttention`, kept fused; its keys go to the tap.

    nn.MultiheadAttention itself would expand a mask to every head and query, and gives no keys.
    """
    packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = packed.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    dropout = attn.dropout if attn.training else 0.0
    if tap is not None and tap.acts_in(attn):
        call = tap.call(attn.head_dim**-0.5, attn_mask, dropout)
        out = attn._vtoken_method.attend(q, k, v, attn.predictor, call)
        tap.done(call, k)
    else:
        if tap is not None:
            tap.keys = k
        out = masked_attention(q, k, v, attn_mask, dropout_p=dropout)
    projected: Tensor = attn.out_proj(out.transpose(1, 2).flatten(2))
    return projected


def _plain_attention(attn: Any) -> nn.MultiheadAttention | None:
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
ATTENTION_MIXINS: dict[type, type] = {nn.MultiheadAttention: PackedMixin, Attention: OwnAttentionMixin}
BLOCKS: dict[type, type] = {
    ResidualAttentionBlock: BlockMixin,
    CustomResidualAttentionBlock: CustomBlockMixin,
}


def _forward_of(tower: Any, x: Tensor, *, raster: bool, dense: bool = False) -> forward_of:
    anchor = raster and block_method(tower).order == "raster"
    size = (x.shape[2], x.shape[3])
    return forward_of(tower, NUM_PREFIX, lambda: grid_of(tower, size), anchor=anchor, dest=dense)


def _stand_in(tower: Any, transformer: BoundTransformer) -> Any:
    """The tower with one forward's transformer, and with poolings that know its sizes."""
    parts: dict[str, Any] = {"transformer": transformer}
    if tower.attn_pool is not None:
        parts["attn_pool"] = functools.partial(_attention_pool, tower.attn_pool, transformer)
        if tower.attn_pool_contrastive is not None and tower.attn_pool_type == "parallel":
            parts["attn_pool_contrastive"] = functools.partial(
                _attention_pool, tower.attn_pool_contrastive, transformer
            )
    elif tower.pool_type == "avg":
        parts["_global_pool"] = functools.partial(_average_pool, transformer)
    return view(tower, **parts)


def _average_pool(transformer: BoundTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    size, rows = transformer.slot.size, x[:, NUM_PREFIX:]
    return rows.mean(dim=1) if size is None else weighted_mean(rows, size[:, NUM_PREFIX:]), rows


def _parts(block: Any) -> tuple[type, Any, type]:
    """The mixin of a block, its attention, also inside peft's LoRA layer, and the mixin of that."""
    attn = _plain_attention(block.attn) or block.attn
    return mixin_for(block, BLOCKS), attn, mixin_for(attn, ATTENTION_MIXINS)


def _attention_pool(pool: Any, transformer: BoundTransformer, x: Tensor) -> Any:
    size = transformer.slot.size
    return pool(x) if size is None else pool(x, vtoken_size=size)


def grid_of(tower: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of an image of `img_size` pixels."""
    return img_size[0] // int(tower.patch_size[0]), img_size[1] // int(tower.patch_size[1])


class OpenClipAdapter(HostAdapter):
    """open_clip's image towers; the text tower is never touched."""

    name = "open_clip image towers"
    package = "open_clip"
    hooks = frozenset({"on_block", "on_attention"})

    def tower(self, model: nn.Module) -> tuple[HostAdapter, Any]:
        """The module that runs the image blocks, and the adapter that knows it."""
        visual: Any = getattr(model, "visual", model)
        if isinstance(visual, TimmModel):
            return find_adapter(visual.trunk), visual.trunk
        if isinstance(visual, VisionTransformer):
            return self, visual
        raise UnsupportedModelError(_refusal(model, f"its image tower is a {type(visual).__qualname__}"))

    def spec(self, model: nn.Module) -> HostSpec:
        """Check the tower block by block."""
        adapter, tower = self.tower(model)
        if adapter is not self:
            return adapter.spec(tower)
        if forward_is_replaced(tower):
            why = "forward was replaced on the instance, which merging would bypass (apply before accelerate's prepare)"
            raise UnsupportedModelError(_refusal(model, why))
        if not isinstance(tower.transformer, Transformer):
            raise UnsupportedModelError(_refusal(model, f"its transformer is a {type(tower.transformer).__qualname__}"))
        for name, block in self.blocks(model):
            problem = _block_problem(block)
            if problem:
                raise UnsupportedModelError(_refusal(model, f"{name} is {problem}"))
        attn = tower.transformer.resblocks[0].attn
        return HostSpec(
            name=type(model).__name__,
            depth=len(tower.transformer.resblocks),
            width=tower.transformer.width,
            num_heads=attn.num_heads,
            head_dim=attn.head_dim,
            num_prefix=NUM_PREFIX,
            grid=grid_of(tower, self.image_size(model)),
            pooling="map" if tower.attn_pool is not None else tower.pool_type,
            position="absolute",
        )

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns."""
        adapter, tower = self.tower(model)
        return grid_of(tower, img_size) if adapter is self else adapter.grid(tower, img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the tower was built for."""
        adapter, tower = self.tower(model)
        if adapter is not self:
            return adapter.image_size(tower)
        return int(tower.image_size[0]), int(tower.image_size[1])

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The image tower's blocks."""
        adapter, tower = self.tower(model)
        if adapter is not self:
            return adapter.blocks(tower)
        return [(f"transformer.resblocks.{i}", block) for i, block in enumerate(tower.transformer.resblocks)]

    def targets(self, model: nn.Module, methods: dict[str, Method]) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The tower, then every block with its index."""
        adapter, tower = self.tower(model)
        if adapter is not self:
            return adapter.targets(tower, methods)
        container, sparse = tower.transformer.resblocks, (nn.MultiheadAttention,)
        pools = [tower.attn_pool]
        if pools[0] is not None and tower.attn_pool_type == "parallel":
            pools.append(tower.attn_pool_contrastive)
        return [
            (tower, OpenClipTowerMixin, {}),
            (tower.transformer, TransformerMixin, {}),
            *((pool, PoolMixin, {}) for pool in pools if pool is not None),
            *block_targets(methods, container, _parts, num_prefix=NUM_PREFIX, sparse=sparse),
        ]

    def run_image(self, model: Any, image: Tensor) -> Any:
        """The tower alone: a whole CLIP also wants text."""
        return self.tower(model)[1](image)

    def run_watched(self, model: nn.Module, watch: Watch, image: Tensor) -> None:
        """Class attention of the packed projection, or behind the norms of open_clip's own attention."""
        adapter, tower = self.tower(model)
        (run_watched if adapter is self else adapter.run_watched)(tower, watch, image)

    def patch_spec(self, model: nn.Module) -> PatchSpec:
        """Of a built-in tower, or of a timm trunk that can."""
        return patch_spec(getattr(model, "visual", model))

    def masked(
        self, model: nn.Module, images: Tensor, rows: Tensor | None, watch: Watch | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Patches are left out in the slot of the tower's patch dropout."""
        return run_masked(getattr(model, "visual", model), images, rows, watch)


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"cannot reduce the tokens of open_clip {type(model).__name__}: {why}. Supported: image towers of class "
        "VisionTransformer with ResidualAttentionBlock or CustomResidualAttentionBlock, and timm trunks that vtoken "
        "supports. The model was left as it was."
    )


def _block_problem(block: Any) -> str | None:
    kind = base_of(type(block))
    known = next((cls for cls in kind.__mro__ if cls in BLOCKS), None)
    if known is None or kind.forward is not known.forward or forward_is_replaced(block):  # type: ignore[attr-defined]
        return f"a {kind.__qualname__}, whose forward vtoken does not know"
    attn = block.attn
    if known is CustomResidualAttentionBlock:
        if base_of(type(attn)) is not Attention:
            return f"a {kind.__qualname__} with a {type(attn).__qualname__}"
        return "one with scaled cosine attention, which takes no key norm" if attn.scaled_cosine else None
    plain = _plain_attention(attn)
    if plain is None or forward_is_replaced(plain) or not attn._qkv_same_embed_dim or attn.add_zero_attn:
        return f"a {kind.__qualname__} with a {type(attn).__qualname__} that is not plain packed self-attention"
    return "one with key biases of its own" if attn.bias_k is not None else None
