"""timm VisionTransformer (vit, deit, hybrids, ViTamin), Eva (EVA-02, DINOv3, PE, rope ViTs) and NaFlexVit."""

from __future__ import annotations

import functools
from typing import Any

from timm.layers.attention_pool import AttentionPoolLatent
from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtoken.core.errors import UnsupportedModelError
from vtoken.core.host import HostAdapter, HostSpec
from vtoken.core.method import BlockMethod, Method
from vtoken.core.patch import base_of, view
from vtoken.core.state import Slot, TokenState
from vtoken.core.trace import current_trace
from vtoken.hosts.pooling import SIZED_POOLS, pool_kind, remember_sizes, sized_pool, sizes_for_head
from vtoken.hosts.timm_blocks import ATTENTIONS, BLOCKS
from vtoken.hosts.timm_unsupported import reason
from vtoken.hosts.tower import BoundBlocks, spread
from vtoken.ops.rows import take_rows

MODELS: tuple[type, ...] = (VisionTransformer, Eva, NaFlexVit)


class TimmMixin:
    """The entry methods of a patched model: each makes one forward's state and runs the host's own code with it."""

    _vtoken: Any

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = _begin(self)
        out = base_of(type(self)).forward(_bind(self, state), *args, **kwargs)  # type: ignore[attr-defined]
        _record(self, state, args, kwargs)
        return out

    def forward_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = _begin(self, raster=True)
        out = base_of(type(self)).forward_features(_bind(self, state), *args, **kwargs)  # type: ignore[attr-defined]
        _record(self, state, args, kwargs)
        if isinstance(out, dict):  # NaFlex
            return out | {"patches": _hand_out(self, state.last, out["patches"])}
        return _hand_out(self, state.last, out)

    def forward_intermediates(
        self: Any,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        dense = output_fmt == "NCHW" and isinstance(x, Tensor)
        state = _begin(self, raster=True, dense=dense)
        # Rows are asked for and spread here: the host's own reshape would scramble reduced rows without an error.
        out = base_of(type(self)).forward_intermediates(  # type: ignore[attr-defined]
            _bind(self, state), x, indices, return_prefix_tokens, norm, stop_early,
            "NLC" if dense else output_fmt, intermediates_only, **kwargs,
        )  # fmt: skip
        _record(self, state, (x,), {})
        layers = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))
        grid = grid_of(self, (x.shape[-2], x.shape[-1])) if dense else None
        finish = functools.partial(_intermediate, self, state, grid)
        if isinstance(out, dict):
            found = [finish(layer, y) for layer, y in zip(layers, out["image_intermediates"], strict=True)]
            out = out | {"image_intermediates": found}
            if "image_features" in out:
                out["image_features"] = _hand_out(self, state.last, out["image_features"])
            return out
        rows = out if intermediates_only else out[1]
        found = [finish(layer, y) for layer, y in zip(layers, rows, strict=True)]
        return found if intermediates_only else (_hand_out(self, state.last, out[0]), found)

    def forward_head(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        size = sizes_for_head(self, x, _num_embedded(self))
        parts = {} if size is None else _pool_parts(self, lambda: size)
        return base_of(type(self)).forward_head(view(self, **parts), x, *args, **kwargs)  # type: ignore[attr-defined]


def _method(model: Any) -> BlockMethod:
    method: BlockMethod = model._vtoken.methods["on_block"]
    return method


def _begin(model: Any, *, raster: bool = False, dense: bool = False) -> TokenState:
    method, traced = _method(model), current_trace(model) is not None
    rotary = getattr(model, "rope", None) is not None
    anchor = traced or rotary or (raster and method.order == "raster")
    return TokenState(method, model.num_prefix_tokens, track_anchor=anchor, track_dest=traced or dense)


def _bind(model: Any, state: TokenState) -> Any:
    """The model with this forward's state bound to its blocks and its pooling."""
    blocks = BoundBlocks(model.blocks, list(model.blocks), state)
    return view(model, blocks=blocks, **_pool_parts(model, lambda: state.last.size))


def _pool_parts(model: Any, sizes: Any) -> dict[str, Any]:
    name = _pool_name(model)
    return {name: functools.partial(sized_pool, model, name, sizes)}


def _pool_name(model: Any) -> str:
    return "_pool" if isinstance(model, NaFlexVit) else "pool"


def _record(model: Any, state: TokenState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    trace = current_trace(model)
    if trace is not None:
        images = next((a for a in [*args, *kwargs.values()] if isinstance(a, Tensor) and a.dim() == 4), None)
        trace.record(state, None if images is None else grid_of(model, (images.shape[2], images.shape[3])))


def _hand_out(model: Any, slot: Slot, features: Tensor) -> Tensor:
    """Tokens as they leave the model: in raster order (unless "internal" was chosen), sizes riding along."""
    if _method(model).order == "raster":
        rows, slot = slot.in_raster_order(features)
        features = features if rows is None else rows
    return remember_sizes(features, slot.size)


def _intermediate(model: Any, state: TokenState, grid: tuple[int, int] | None, layer: int, y: Any) -> Any:
    """One intermediate, patch rows [B, N, C] or (rows, prefix): spread to a map, or put in raster order."""
    if isinstance(y, tuple):
        return (_intermediate(model, state, grid, layer, y[0]), *y[1:])
    slot, num_prefix = state.slots[layer + 1], state.num_prefix
    if grid is not None:
        return spread(y, slot, num_prefix, grid)
    if slot.anchor is None or _method(model).order == "internal":
        return y
    return take_rows(y, slot.anchor[:, num_prefix:].argsort(dim=1))


def grid_of(model: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of an image of `img_size` pixels."""
    embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
    height, width = embed.dynamic_feat_size(img_size)
    return int(height), int(width)


def _num_embedded(model: Any) -> int:
    height, width = grid_of(model, _image_size(model))
    return int(model.num_prefix_tokens + height * width)


def _image_size(model: Any) -> tuple[int, int]:
    embed = model.embeds if isinstance(model, NaFlexVit) else model.patch_embed
    size = getattr(embed, "img_size", None) or model.pretrained_cfg["input_size"][-2:]
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) else (int(size), int(size))


class TimmAdapter(HostAdapter):
    """timm's plain-attention towers, recognised by class identity and structure, never by name."""

    name = "timm VisionTransformer, Eva, NaFlexVit"
    hooks = frozenset({"on_block"})

    def matches(self, model: nn.Module) -> bool:
        """Every model whose class comes from timm; `spec` refuses the unsupported ones by name."""
        return any(cls.__module__.startswith("timm.") for cls in type(model).__mro__)

    def spec(self, model: nn.Module) -> HostSpec:
        """Check the structure block by block; raises UnsupportedModelError with the reason."""
        if not isinstance(model, MODELS):
            raise UnsupportedModelError(_refusal(model, reason(model)))
        tower: Any = model
        blocks = self.blocks(model)
        if not blocks:
            raise UnsupportedModelError(_refusal(model, "it has no blocks"))
        for name, block in blocks:
            problem = _block_problem(block)
            if problem:
                raise UnsupportedModelError(_refusal(model, f"{name} is {problem}"))
        problem = _pool_problem(tower)
        if problem:
            raise UnsupportedModelError(_refusal(model, problem))
        attn: Any = blocks[0][1].attn
        rope = getattr(tower, "rope", None)
        return HostSpec(
            name=type(model).__name__,
            depth=len(blocks),
            width=int(tower.embed_dim),
            num_heads=int(attn.num_heads),
            head_dim=int(attn.head_dim if hasattr(attn, "head_dim") else tower.embed_dim // attn.num_heads),
            num_prefix=int(tower.num_prefix_tokens),
            grid=grid_of(tower, _image_size(tower)),
            pooling=pool_kind(tower),
            position="absolute" if rope is None else "rotary",
        )

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns, padding of dynamic sizes included."""
        return grid_of(model, img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the model was built for."""
        return _image_size(model)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The flat `blocks` sequence."""
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
            return []
        return [(f"blocks.{name}", block) for name, block in blocks.named_children()]

    def targets(self, model: nn.Module, methods: dict[str, Method]) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The model, then every block with its index."""
        found: list[tuple[nn.Module, type, dict[str, Any]]] = [(model, TimmMixin, {})]
        for index, (_, block) in enumerate(self.blocks(model)):
            mixin = BLOCKS[next(cls for cls in type(block).__mro__ if cls in BLOCKS)]
            found.append((block, mixin, {"_vtoken_index": index}))
        return found


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"cannot reduce the tokens of {type(model).__name__}: {why}. Supported timm models: VisionTransformer, "
        f"VisionTransformerDistilled, Eva and NaFlexVit whose blocks are all {', '.join(c.__name__ for c in BLOCKS)} "
        f"with {', '.join(c.__name__ for c in ATTENTIONS)}. The model was left as it was."
    )


def _block_problem(block: Any) -> str | None:
    kind = base_of(type(block))
    known = next((cls for cls in kind.__mro__ if cls in BLOCKS), None)
    if known is None:
        return f"a {kind.__module__}.{kind.__qualname__}, {reason(block)}"
    if kind.forward is not known.forward or "forward" in block.__dict__:  # type: ignore[attr-defined]
        return f"a {kind.__qualname__} with a forward of its own, which merging would bypass"
    attn = type(block.attn)
    known = next((cls for cls in attn.__mro__ if cls in ATTENTIONS), None)
    if known is None or attn.forward is not known.forward or "forward" in block.attn.__dict__:  # type: ignore[attr-defined]
        return f"a {kind.__qualname__} with {attn.__module__}.{attn.__qualname__}, {reason(block.attn)}"
    return None


def _pool_problem(model: Any) -> str | None:
    kind = pool_kind(model)
    if kind not in SIZED_POOLS:
        return None
    cls, name = base_of(type(model)), _pool_name(model)
    if not any(getattr(cls, name) is getattr(known, name, None) for known in MODELS):
        return f"its class overrides {name}(), so its {kind!r} pooling would weigh merged tokens as single patches"
    pool: Any = getattr(model, "attn_pool", None)
    if kind == "map" and not (
        isinstance(pool, AttentionPoolLatent) and type(pool).forward is AttentionPoolLatent.forward
    ):
        return f"its attention pool is a {type(pool).__qualname__}, which takes no attention mask"
    if kind == "map" and pool.pos_embed is not None:
        return "its attention pool adds a position to every token, which merged tokens no longer have"
    return None
