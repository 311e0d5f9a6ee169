"""timm VisionTransformer (vit, deit, hybrids, ViTamin), Eva (EVA-02, DINOv3, PE, rope ViTs) and NaFlexVit."""

from __future__ import annotations

from typing import Any

from timm.layers.attention_pool import AttentionPoolLatent
from torch import nn

from vtoken.core.host import HostAdapter, inner_hint
from vtoken.core.method import AttentionMethod, BlockMethod, Methods
from vtoken.core.patch import base_of, runs_as_known
from vtoken.core.spec import HostSpec
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.pooling import SIZED_POOLS, pool_kind
from vtoken.hosts.timm.blocks import ATTENTIONS, BLOCKS, parts
from vtoken.hosts.timm.entry import MODELS, TimmMixin, fixed_size, grid_of, image_size, pool_name
from vtoken.hosts.timm.masked import patch_spec, run_masked
from vtoken.hosts.timm.unsupported import reason
from vtoken.hosts.timm.watched import run_watched
from vtoken.hosts.tower import block_targets

_ENTRIES = ("forward_features", "forward_intermediates", "forward_head")


class TimmAdapter(HostAdapter):
    """timm's plain-attention towers, recognised by class identity and structure, never by name."""

    name = "timm VisionTransformer, Eva, NaFlexVit"
    package = "timm"
    serves = (BlockMethod, AttentionMethod)
    grid = staticmethod(grid_of)
    image_size = staticmethod(image_size)
    run_watched = staticmethod(run_watched)
    patch_spec = staticmethod(patch_spec)
    masked = staticmethod(run_masked)

    def spec(self, model: nn.Module) -> HostSpec:
        """Check the structure block by block; raises UnsupportedModelError with the reason."""
        if type(model) in BLOCKS:
            raise UnsupportedModelError(_refusal(model, "it is a single block; pass the model that holds it"))
        if not isinstance(model, MODELS):
            raise UnsupportedModelError(_refusal(model, reason(model)))
        tower: Any = model
        blocks: list[tuple[str, Any]] = self.blocks(model)
        if not blocks:
            raise UnsupportedModelError(_refusal(model, "it has no blocks"))
        if len({id(block) for _, block in blocks}) < len(blocks):
            raise UnsupportedModelError(_refusal(model, "it runs one block module in several layers"))
        own = [n for n in (*_ENTRIES, pool_name(tower)) if n in vars(model)]
        if own:
            raise UnsupportedModelError(_refusal(model, f"{own[0]} was replaced on the instance; subclass it instead"))
        other = [
            (name, block)
            for name, block in blocks
            if not (runs_as_known(block, BLOCKS) and runs_as_known(block.attn, ATTENTIONS))
        ]
        if other:
            raise UnsupportedModelError(_refusal(model, f"{other[0][0]} is {_block_problem(other[0][1])}"))
        pooling = pool_kind(tower)
        problem = _pool_problem(tower, pooling)
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
            grid=grid_of(tower, image_size(tower)),
            pooling=pooling,
            position="absolute" if rope is None else "rotary",
            fixed_size=fixed_size(tower),
            class_token=getattr(getattr(tower, "embeds", tower), "cls_token", None) is not None,
        )

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The flat `blocks` sequence."""
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
            return []
        return [(f"blocks.{name}", block) for name, block in blocks._modules.items() if block is not None]

    def targets(self, model: nn.Module, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The model, then every block with its index."""
        tower: Any = model
        found = block_targets(methods, tower.blocks, parts, num_prefix=int(tower.num_prefix_tokens), sparse=ATTENTIONS)
        return [(model, TimmMixin, {}), *found]


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"cannot reduce the tokens of {type(model).__name__}: {why}. Supported timm models: VisionTransformer, "
        f"VisionTransformerDistilled, Eva and NaFlexVit whose blocks are all {', '.join(c.__name__ for c in BLOCKS)} "
        f"with {', '.join(c.__name__ for c in ATTENTIONS)}.{inner_hint(model)} The model was left as it was."
    )


def _block_problem(block: Any) -> str:
    """What is wrong with a block that is not known, or has an attention that is not."""
    kind = base_of(type(block))
    known = next((cls for cls in kind.__mro__ if cls in BLOCKS), None)
    if known is None:
        return f"a {kind.__module__}.{kind.__qualname__}, {reason(block)}"
    if not runs_as_known(block, BLOCKS):
        return f"a {kind.__qualname__} with a forward of its own, which merging would bypass"
    attn = base_of(type(block.attn))
    return f"a {kind.__qualname__} with {attn.__module__}.{attn.__qualname__}, {reason(block.attn)}"


def _pool_problem(model: Any, kind: str) -> str | None:
    if kind not in SIZED_POOLS:
        return None
    cls, name = base_of(type(model)), pool_name(model)
    if not any(getattr(cls, name) is getattr(known, name, None) for known in MODELS):
        return f"its class overrides {name}(), so its {kind!r} pooling would weigh merged tokens as single patches"
    pool: Any = getattr(model, "attn_pool", None)
    if kind == "map" and not (
        isinstance(pool, AttentionPoolLatent) and type(pool).forward is AttentionPoolLatent.forward
    ):
        return f"its attention pool is a {type(pool).__qualname__}, which takes no attention mask"
    if kind == "prr" and not runs_as_known(pool, [c for c in type(pool).__mro__ if c.__module__.startswith("timm.")]):
        return f"its attention pool is a {type(pool).__qualname__} with a forward of its own"
    if kind == "map" and pool.pos_embed is not None:
        return "its attention pool adds a position to every token, which merged tokens no longer have"
    return None
