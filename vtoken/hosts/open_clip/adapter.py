"""open_clip: the image tower of a CLIP, CustomTextCLIP or CoCa, or the tower itself; built-in ViTs and timm trunks."""

from __future__ import annotations

from typing import Any

from open_clip import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from vtoken.core.host import HostAdapter, find_adapter
from vtoken.core.method import AttentionMethod, BlockMethod, Methods
from vtoken.core.patch import base_of, forward_is_replaced
from vtoken.core.spec import HostSpec, Pair, PatchSpec
from vtoken.core.watch import Watch
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.open_clip.blocks import BLOCKS, PoolMixin, parts, plain_attention
from vtoken.hosts.open_clip.entry import NUM_PREFIX, OpenClipTowerMixin, TransformerMixin, grid_of
from vtoken.hosts.open_clip.masked import patch_spec, run_masked
from vtoken.hosts.open_clip.watched import run_watched
from vtoken.hosts.tower import block_targets


class OpenClipAdapter(HostAdapter):
    """open_clip's image towers; the text tower is never touched."""

    name = "open_clip image towers"
    package = "open_clip"
    serves = (BlockMethod, AttentionMethod)

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

    def targets(self, model: nn.Module, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
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
            *block_targets(methods, container, parts, num_prefix=NUM_PREFIX, sparse=sparse),
        ]

    def run_image(self, model: Any, image: Tensor) -> Any:
        """The tower alone: a whole CLIP also wants text."""
        return self.tower(model)[1](image)

    def run_watched(self, model: nn.Module, watch: Watch, image: Tensor) -> None:
        """Class attention of the packed projection, or behind the norms of open_clip's own attention."""
        adapter, tower = self.tower(model)
        (run_watched if adapter is self else adapter.run_watched)(tower, watch, image)

    def pair(self, model: nn.Module) -> Pair | None:
        """Of the two models that do nothing else."""
        return Pair("visual") if isinstance(model, (CLIP, CustomTextCLIP)) else None

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
    plain = plain_attention(attn)
    if plain is None or forward_is_replaced(plain) or not attn._qkv_same_embed_dim or attn.add_zero_attn:
        return f"a {kind.__qualname__} with a {type(attn).__qualname__} that is not plain packed self-attention"
    return "one with key biases of its own" if attn.bias_k is not None else None
