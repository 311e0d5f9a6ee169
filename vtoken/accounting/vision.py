"""What a plain vision transformer costs, from its measures alone (docs/methods/quota.md 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtoken.errors import ConfigError


@dataclass(frozen=True)
class Tower:
    """The measures of a vision transformer that its cost depends on: blocks, channels, channels inside the MLP."""

    layers: int
    width: int
    mlp_width: int

    @classmethod
    def of(cls, source: Any) -> Tower:
        """The measures of a transformers model or configuration, of its vision tower if it is multimodal.

        Raises:
            ConfigError: if it does not tell them.
        """
        if isinstance(source, cls):
            return source
        config = getattr(source, "config", source)
        config = getattr(config, "vision_config", config)
        # Qwen-VL towers name theirs differently.
        width = getattr(config, "embed_dim", None) or getattr(config, "hidden_size", None)
        layers = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None)
        mlp = getattr(config, "intermediate_size", None) or (width or 0) * getattr(config, "mlp_ratio", 0)
        if not (width and layers and mlp):
            raise ConfigError(f"cannot read a vision tower's measures from {type(source).__name__}")
        return cls(int(layers), int(width), int(mlp))


def tower_flops(tower: Any, num_tokens: int) -> int:
    """FLOPs of the blocks on one image of `num_tokens` patches: 2 per multiply-add; MLPs of two matrices.

    Args:
        tower: a `Tower`, or a transformers model or configuration.

    Example:
        >>> from vtoken.accounting.vision import Tower, tower_flops
        >>> round(tower_flops(Tower(layers=24, width=1024, mlp_width=4096), 257) / 1e9, 1)  # CLIP ViT-L/14
        161.7
    """
    t = Tower.of(tower)
    linear = 4 * t.width * t.width + 2 * t.width * t.mlp_width
    return t.layers * (2 * num_tokens * linear + 4 * num_tokens * num_tokens * t.width)
