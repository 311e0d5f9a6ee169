"""The image towers that attentive masking knows: open_clip's own and timm trunks behind open_clip's adapter.

Student and teacher run through views (docs/mechanism.md 2): the tower's own code with some parts replaced for one call.
The slot of patch dropout, which masking replaces, lies where patches must be left out: behind the position embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import open_clip
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.transformer import CustomResidualAttentionBlock
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vtoken.core.host import host_of
from vtoken.core.patch import is_patched, view
from vtoken.core.spec import HostSpec
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.ops import class_row, projected_class_row
from vtoken.ops.rows import take_rows

_SUPPORTED = (
    "Supported: open_clip CLIP and CustomTextCLIP whose image tower is open_clip's VisionTransformer or a timm "
    "VisionTransformer with a class token."
)


class ClassAttention:
    """Stands where a tower's blocks stood: runs them and reads the class token's attention in some of them.

    Args:
        blocks: the tower's.
        row: attention of the class token in a block, of the block and its input [B, T, C].
        layers: the blocks that are read.
        stop: leave out the blocks behind the last one that is read; the output then means nothing.
    """

    def __init__(
        self, blocks: list[Any], row: Callable[[Any, Tensor], Tensor], layers: Collection[int], *, stop: bool
    ) -> None:
        self._blocks = blocks[: max(layers) + 1] if stop else blocks
        self._row = row
        self._layers = layers
        self._rows: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self._blocks):
            if index in self._layers:
                self._rows.append(self._row(block, x))
            x = block(x)
        return x

    def scores(self) -> Tensor:
        """Mean over the layers that were read, [B, T] float32."""
        total = self._rows[0]
        for row in self._rows[1:]:
            total = total + row
        return total / len(self._rows)


class Tower:
    """What is known of one family of image towers; it holds no state, every method is given the tower."""

    def check(self, visual: Any) -> None:
        """Raise UnsupportedModelError if the family's towers can be masked, but not this one."""
        raise NotImplementedError

    def core(self, visual: Any) -> nn.Module:
        """The module that `vtoken.apply` would patch."""
        return visual

    def refuse_patched(self, visual: Any) -> None:
        """Raise UnsupportedModelError if a method was applied since: masking runs the unpatched tower."""
        if is_patched(self.core(visual)):
            raise _patched()

    def blocks(self, visual: Any) -> list[Any]:
        """In order."""
        raise NotImplementedError

    def patch_embed(self, visual: Any) -> nn.Module:
        """What turns pixels into patch tokens."""
        raise NotImplementedError

    def patch_size(self, visual: Any) -> tuple[int, int]:
        """Height and width in pixels."""
        raise NotImplementedError

    def image_size(self, visual: Any) -> tuple[int, int] | None:
        """Height and width of the images that it takes; None: any."""
        raise NotImplementedError

    def features(self, visual: Any) -> int:
        """Width of the pooled features, before the projection."""
        raise NotImplementedError

    def student(self, visual: Any, images: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pooled features before the projection and behind it, [B, w] and [B, E].

        Args:
            rows: tokens that enter the blocks, prefix tokens among them, [B, T]; None: all.
        """
        raise NotImplementedError

    def teacher(
        self, visual: Any, images: Tensor, layers: Collection[int], *, stop: bool
    ) -> tuple[ClassAttention, Tensor]:
        """The class token's attention in some layers, and the pooled features; images of any whole number of patches.

        Args:
            stop: the features are not needed.
        """
        raise NotImplementedError


class BuiltinTower(Tower):
    """open_clip `VisionTransformer`."""

    def check(self, visual: Any) -> None:
        if not isinstance(visual.patch_dropout, nn.Identity):
            raise _own_dropout("model", f"patch_dropout={visual.patch_dropout.prob}")
        if visual.output_tokens:
            raise _refused("its image tower hands out tokens (output_tokens)")
        for block in self.blocks(visual):
            if type(block.attn).__name__ not in ("MultiheadAttention", "Attention"):
                raise _refused(f"an attention was replaced by a {type(block.attn).__qualname__}; wrap the model first")

    def blocks(self, visual: Any) -> list[Any]:
        return list(visual.transformer.resblocks)

    def patch_embed(self, visual: Any) -> nn.Module:
        return visual.conv1

    def patch_size(self, visual: Any) -> tuple[int, int]:
        return int(visual.patch_size[0]), int(visual.patch_size[1])

    def image_size(self, visual: Any) -> tuple[int, int] | None:
        return int(visual.image_size[0]), int(visual.image_size[1])

    def features(self, visual: Any) -> int:
        return int(visual.ln_post.normalized_shape[0])

    def student(self, visual: Any, images: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        pooled: list[Tensor] = []
        parts = {} if rows is None else {"patch_dropout": functools.partial(take_rows, index=rows)}
        out = view(visual, _pool=functools.partial(_pool, visual, pooled), **parts)(images)
        return pooled[0], out

    def teacher(
        self, visual: Any, images: Tensor, layers: Collection[int], *, stop: bool
    ) -> tuple[ClassAttention, Tensor]:
        pooled: list[Tensor] = []
        reader = ClassAttention(self.blocks(visual), _builtin_row, layers, stop=stop)
        size = self.patch_size(visual)
        grid = [images.shape[2] // size[0], images.shape[3] // size[1]]
        table = visual.positional_embedding.unsqueeze(0)
        parts = {
            "transformer": reader,
            "positional_embedding": resample_abs_pos_embed(table, grid, list(visual.grid_size)).squeeze(0),
        }
        view(visual, _pool=functools.partial(_pool, visual, pooled), **parts)(images)
        return reader, pooled[0]


class TrunkTower(Tower):
    """open_clip `TimmModel` around a timm `VisionTransformer`."""

    def check(self, visual: Any) -> None:
        trunk = visual.trunk
        if not isinstance(trunk, VisionTransformer) or type(trunk).forward_head is not VisionTransformer.forward_head:
            raise _refused(f"its timm trunk is a {type(trunk).__qualname__}")
        if not isinstance(trunk.patch_embed, PatchEmbed):
            raise _refused(f"its patches come from a {type(trunk.patch_embed).__qualname__}, in which they overlap")
        if not isinstance(trunk.patch_drop, nn.Identity):
            raise _own_dropout("trunk", f"patch_drop_rate={trunk.patch_drop.prob}")
        for block in self.blocks(visual):
            if not isinstance(block.attn, Attention) or type(block.attn.qkv) is not nn.Linear:
                raise _refused(f"one of its attentions is a {type(block.attn).__qualname__} that is not plain")

    def core(self, visual: Any) -> nn.Module:
        return visual.trunk

    def blocks(self, visual: Any) -> list[Any]:
        return list(visual.trunk.blocks)

    def patch_embed(self, visual: Any) -> nn.Module:
        return visual.trunk.patch_embed

    def patch_size(self, visual: Any) -> tuple[int, int]:
        height, width = visual.trunk.patch_embed.patch_size
        return int(height), int(width)

    def image_size(self, visual: Any) -> tuple[int, int] | None:
        if visual.trunk.dynamic_img_size:
            return None
        height, width = visual.trunk.patch_embed.img_size
        return int(height), int(width)

    def features(self, visual: Any) -> int:
        return int(visual.trunk.num_features)

    def student(self, visual: Any, images: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = {} if rows is None else {"patch_drop": functools.partial(take_rows, index=rows)}
        return self._run(visual, images, parts)

    def teacher(
        self, visual: Any, images: Tensor, layers: Collection[int], *, stop: bool
    ) -> tuple[ClassAttention, Tensor]:
        trunk = visual.trunk
        reader = ClassAttention(self.blocks(visual), _trunk_row, layers, stop=stop)
        parts: dict[str, Any] = {"blocks": reader, "grad_checkpointing": False}
        if not trunk.dynamic_img_size:  # one that is resamples its positions itself
            size = self.patch_size(visual)
            grid = [images.shape[2] // size[0], images.shape[3] // size[1]]
            parts["patch_embed"] = view(trunk.patch_embed, img_size=None)
            if trunk.pos_embed is not None:
                prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
                old = list(trunk.patch_embed.grid_size)
                parts["pos_embed"] = resample_abs_pos_embed(trunk.pos_embed, grid, old, prefix)
        return reader, self._run(visual, images, parts)[0]

    def _run(self, visual: Any, images: Tensor, parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
        pooled: list[Tensor] = []
        head = functools.partial(_head, visual.trunk.head, pooled)
        out = view(visual, trunk=view(visual.trunk, head=head, **parts))(images)
        return pooled[0], out


def _pool(visual: Any, pooled: list[Tensor], x: Tensor) -> Any:
    out = visual._pool(x)
    pooled.append(out[0])
    return out


def _head(head: Any, pooled: list[Tensor], x: Tensor) -> Tensor:
    pooled.append(x)
    result: Tensor = head(x)
    return result


def _builtin_row(block: Any, x: Tensor) -> Tensor:
    norms = (block.attn.ln_q, block.attn.ln_k) if isinstance(block, CustomResidualAttentionBlock) else None
    return _row(block.attn, block.attn.in_proj_weight, block.attn.in_proj_bias, norms, block.ln_1(x))


def _trunk_row(block: Any, x: Tensor) -> Tensor:
    attn = block.attn
    x = x if isinstance(block, ResPostBlock) else block.norm1(x)
    return _row(attn, attn.qkv.weight, attn.qkv.bias, (attn.q_norm, attn.k_norm), x)


def _row(attn: Any, weight: Tensor, bias: Tensor | None, norms: Any, x: Tensor) -> Tensor:
    """Attention of the class token, [B, T] float32, by the packed projection of queries, keys and values."""
    (w_q, w_k, _), (b_q, b_k, _) = weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)
    heads, scale = attn.num_heads, attn.head_dim**-0.5
    if norms is None or isinstance(norms[1], nn.Identity):
        return projected_class_row(x, (w_q, b_q), w_k, num_heads=heads, scale=scale)
    q = F.linear(x[:, 0], w_q, b_q).unflatten(1, (heads, -1))
    k = F.linear(x, w_k, b_k).unflatten(2, (heads, -1)).transpose(1, 2)
    return class_row(norms[0](q), norms[1](k), scale=scale)


def tower_of(model: nn.Module) -> tuple[Tower, HostSpec]:
    """What is known of the image tower of a CLIP.

    Raises:
        UnsupportedModelError: if attentive masking cannot train it, with the reason.
        ConfigError: if it drops patches itself.
    """
    if not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        raise _refused(f"{type(model).__module__}.{type(model).__qualname__} is not a CLIP that it knows")
    visual: Any = model.visual
    if any(is_patched(m) for m in visual.modules()):
        raise _patched()
    spec = host_of(model).spec
    if spec.num_prefix == 0 or not spec.class_token:
        raise _refused(f"its image tower ({spec.name}) has no class token, so no class query could say what matters")
    if spec.position == "rotary":
        raise _refused(f"its image tower ({spec.name}) rotates queries and keys by position")
    tower: Tower = TrunkTower() if isinstance(visual, TimmModel) else BuiltinTower()
    tower.check(visual)
    return tower, spec


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"cannot train with attentive masks: {why}. {_SUPPORTED}")


def _patched() -> UnsupportedModelError:
    return _refused(
        "its image tower carries a method of vtoken.apply; call vtoken.remove(model) while training, methods work in "
        "eval mode and on unwrap()"
    )


def _own_dropout(where: str, setting: str) -> ConfigError:
    return ConfigError(
        f"the image tower drops patches itself ({setting} in the {where}); masking would drop them twice: build it "
        "without, keep_ratio says how many patches go on"
    )
