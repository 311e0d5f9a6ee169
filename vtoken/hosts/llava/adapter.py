"""transformers' LLaVA family: models whose prompt has one placeholder per image token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vtoken.core.apply import build_methods
from vtoken.core.config import MethodConfig
from vtoken.core.counts import plan
from vtoken.core.host import Host, HostAdapter
from vtoken.core.method import FeatureMethod, Method
from vtoken.core.patch import base_of, forward_is_replaced
from vtoken.core.spec import HostSpec, ImageTokens
from vtoken.errors import ShapeError, UnsupportedModelError
from vtoken.hosts.llava.entry import InnerMixin, PromptMixin
from vtoken.hosts.llava.features import drops_first, feature_layer, tower_of
from vtoken.hosts.transformers.adapter import HFAdapter
from vtoken.hosts.transformers.families import grid_of, keys_of, num_prefix

MODELS = {
    ("llava", "LlavaForConditionalGeneration"),
    ("vipllava", "VipLlavaForConditionalGeneration"),
    ("llava_next", "LlavaNextForConditionalGeneration"),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    ("video_llava", "VideoLlavaForConditionalGeneration"),
}
_TOWERS = {("clip", "CLIPVisionModel"), ("siglip", "SiglipVisionModel")}
#: Why well-known relatives are refused, by the module of transformers.models.
REASONS = {
    "llava_next_video": "its video frames are pooled before the projector, which is not supported yet",
    "qwen2_vl": "its tower has no class token and numbers tokens along three axes",
    "qwen2_5_vl": "its tower has no class token, windows its attention and numbers tokens along three axes",
    "qwen3_vl": "its tower has no class token and its features enter several layers of the language model",
    "mllama": "its language model reads images by cross-attention, not from the prompt",
    "idefics": "its language model reads images by cross-attention, not from the prompt",
    "idefics2": "its resampler mixes image tokens, which then belong to no patch",
    "idefics3": "it shuffles patches into channels before the projector",
    "internvl": "it shuffles patches into channels before the projector",
    "gemma3": "it pools patches before the projector",
    "paligemma": "its attention mask tells image tokens from text, which a shortened prompt does not keep",
}


class LlavaAdapter(HostAdapter):
    """Recognised by module and class; the tower must be CLIP's or SigLIP's."""

    name = "transformers LLaVA, ViP-LLaVA, LLaVA-NeXT, LLaVA-OneVision and Video-LLaVA"
    package = "transformers"
    hooks = frozenset({"on_features"})
    part = "prompt"

    def supported(self) -> str:
        """Its classes."""
        return f"transformers {_known()}"

    def spec(self, model: nn.Module) -> HostSpec:
        """The measures of the image tower; raises UnsupportedModelError unless all that is needed is understood."""
        self._refuse_unknown(model)
        tower = self.tower(model)
        return replace(HFAdapter().spec(tower), name=type(model).__name__)

    def _refuse_unknown(self, model: nn.Module) -> None:
        keys = keys_of(type(model))
        if not any(key in MODELS for key in keys):
            reason = next((REASONS[key[0]] for key in keys if key[0] in REASONS), "vtoken does not know its prompts")
            inner = next(
                (n for n, m in model.named_modules() if n and any(k in MODELS for k in keys_of(type(m)))), None
            )
            raise UnsupportedModelError(_refusal(model, reason, f" Use model.{inner}." if inner else ""))
        name, tower = tower_of(model)
        kind = base_of(type(tower))
        if not any(key in _TOWERS for key in keys_of(kind)):
            raise UnsupportedModelError(_refusal(model, f"its image tower is a {kind.__qualname__}"))
        parts: list[tuple[Any, str]] = [(model, type(model).__name__), (model.model, "model"), (tower, f"model.{name}")]
        for module, where in parts:
            own = forward_is_replaced(module)
            if own or any(entry in vars(module) for entry in ("generate", "get_image_features")):
                raise UnsupportedModelError(_refusal(model, f"a method of {where} was replaced on the instance"))

    def check(self, model: nn.Module, methods: dict[str, Method]) -> None:
        """The settings must fit the tower's class token and the layer that the projector reads."""
        method = methods["on_features"]
        assert isinstance(method, FeatureMethod)
        method.layers(feature_layer(model), method.scorer(num_prefix(tower_of(model)[1]) > 0))

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns of one image or crop."""
        return grid_of(tower_of(model)[1], img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the tower was built for."""
        return HFAdapter().image_size(tower_of(model)[1])

    def channels(self, model: nn.Module) -> int:
        """Channels of its images."""
        return int(tower_of(model)[1].config.num_channels)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The tower's layers."""
        name, tower = tower_of(model)
        return [(f"model.{name}.{n}", layer) for n, layer in HFAdapter().blocks(tower)]

    def targets(self, model: nn.Module, methods: dict[str, Method]) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The model, the one inside for those who run it alone, and its tower so that its attention can be read."""
        inner: Any = model.model
        return [(model, PromptMixin, {}), (inner, InnerMixin, {}), *HFAdapter().targets(tower_of(model)[1], {})]

    def tower(self, model: nn.Module) -> Any:
        """The image tower."""
        return tower_of(model)[1]

    def count(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> ImageTokens:
        """Crops and tokens of one image of `size` pixels; towers that merge are counted as they hand tokens out."""
        packs = hasattr(model.model, "pack_image_features")
        first, prefix = int(drops_first(model)), num_prefix(self.tower(model))
        always = max(prefix - first, 0)
        rows = self._rows(model, configs, size)[feature_layer(model) + 1] - first
        crops = _crops(model, size) if packs else 1
        scores = _packed(model, rows, crops, size) if packs else torch.zeros(rows)
        method = self._method(model, configs)
        if method is None:
            return ImageTokens(crops, rows, len(scores), len(scores))
        kept = method.most(scores[always:], rows - always) + always
        exact = not packs or kept == len(scores) or method.newline != "row"
        return ImageTokens(crops, rows, len(scores), kept, exact)

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """One row per layer for class scores, all rows for received ones."""
        method, tower = self._method(model, configs), self.tower(model)
        scorer = method.scorer(num_prefix(tower) > 0)
        rows = self._rows(model, configs, size)
        spent = [rows[layer] * (1 if scorer == "cls" else rows[layer]) for layer in
                 method.layers(feature_layer(model), scorer)]  # fmt: skip
        return sum(spent) * int(tower.config.hidden_size)

    def _rows(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> tuple[int, ...]:
        """Tokens before and after every block of the tower, for one image or crop."""
        tower, in_tower = self.tower(model), [c for c in configs if c.part == "tower"]
        img_size = self.image_size(model) if hasattr(model.model, "pack_image_features") else size
        if in_tower:
            return plan(tower, in_tower, img_size=img_size).settled("the number of image tokens in a prompt")
        height, width = self.grid(model, img_size)
        return (num_prefix(tower) + height * width,) * (self.spec(model).depth + 1)

    def _method(self, model: nn.Module, configs: Sequence[MethodConfig]) -> Any:
        prompt = tuple(c for c in configs if c.part == "prompt")
        return build_methods(Host(self, model, self.spec(model)), prompt)["on_features"] if prompt else None


def _crops(model: Any, size: tuple[int, int]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    return int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def _packed(model: Any, patches: int, crops: int, size: tuple[int, int]) -> torch.Tensor:
    """One image's features as the model packs them: zeros for patches, -1 for newlines."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    if patches != side * side:
        raise ShapeError(f"{patches} tokens of a crop cannot be packed on a grid of {side} x {side}")
    # The two classes name different options; what is not given has the default of the configuration.
    options: dict[str, Any] = {"vision_feature_select_strategy": "full"}
    if hasattr(model.config, "vision_aspect_ratio"):
        options = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    packed, _ = model.model.pack_image_features(
        [torch.zeros(crops, patches, 1)], [list(size)], image_newline=torch.tensor([-1.0]), **options
    )
    rows: torch.Tensor = packed[0][:, 0]
    return rows


def _known() -> str:
    return ", ".join(sorted(name for _, name in MODELS))


def _refusal(model: nn.Module, why: str, hint: str = "") -> str:
    return (
        f"cannot shorten the prompts of transformers {type(model).__name__}: {why}. Supported: {_known()}, with a "
        f"CLIP or SigLIP image tower.{hint} The model was left as it was."
    )
