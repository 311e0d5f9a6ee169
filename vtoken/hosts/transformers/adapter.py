"""transformers: ViT, DeiT, CLIP, SigLIP, SigLIP 2 and DINOv2 image models, and the tower inside a LLaVA."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vtoken.core.host import HostAdapter
from vtoken.core.method import BlockMethod, Method
from vtoken.core.patch import base_of, forward_is_replaced, is_patched
from vtoken.core.spec import HostSpec, Plan
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.hosts.tower import block_targets
from vtoken.hosts.transformers.blocks import (
    LAYERS,
    AttentionMixin,
    MasklessDinoLayerMixin,
    NestedAttentionMixin,
    attention_of,
    refuse_flash,
)
from vtoken.hosts.transformers.entry import (
    ClipTowerMixin,
    DinoBackboneMixin,
    DinoTowerMixin,
    Dinov2HeadMixin,
    Dinov2RegistersHeadMixin,
    Siglip2HeadMixin,
    Siglip2TowerMixin,
    SiglipTowerMixin,
    VisionModelHeadMixin,
    ViTTowerMixin,
    grid_of,
    num_prefix,
    pair,
    tower_targets,
)
from vtoken.hosts.transformers.watched import watched_tower

Key = tuple[str, str]  # module of transformers.models, class name

TOWERS: dict[Key, type] = {
    ("clip", "CLIPVisionModel"): ClipTowerMixin,
    ("siglip", "SiglipVisionModel"): SiglipTowerMixin,
    ("siglip2", "Siglip2VisionModel"): Siglip2TowerMixin,
    ("vit", "ViTModel"): ViTTowerMixin,
    ("deit", "DeiTModel"): ViTTowerMixin,
    ("dinov2", "Dinov2Model"): DinoTowerMixin,
    ("dinov2", "Dinov2Backbone"): DinoBackboneMixin,
    ("dinov2_with_registers", "Dinov2WithRegistersModel"): DinoTowerMixin,
    ("dinov2_with_registers", "Dinov2WithRegistersBackbone"): DinoBackboneMixin,
}
#: Classes that hold a tower: where it is, and a mixin of their own if they average its tokens.
HOLDERS: dict[Key, tuple[str, type | None]] = {
    ("clip", "CLIPModel"): ("vision_model", None),
    ("clip", "CLIPVisionModelWithProjection"): ("vision_model", None),
    ("clip", "CLIPForImageClassification"): ("vision_model", VisionModelHeadMixin),
    ("siglip", "SiglipModel"): ("vision_model", None),
    ("siglip", "SiglipForImageClassification"): ("vision_model", VisionModelHeadMixin),
    ("siglip2", "Siglip2Model"): ("vision_model", None),
    ("siglip2", "Siglip2ForImageClassification"): ("vision_model", Siglip2HeadMixin),
    ("vit", "ViTForImageClassification"): ("vit", None),
    ("deit", "DeiTForImageClassification"): ("deit", None),
    ("deit", "DeiTForImageClassificationWithTeacher"): ("deit", None),
    ("dinov2", "Dinov2ForImageClassification"): ("dinov2", Dinov2HeadMixin),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"): (
        "dinov2_with_registers",
        Dinov2RegistersHeadMixin,
    ),
    ("llava", "LlavaModel"): ("vision_tower", None),
    ("llava", "LlavaForConditionalGeneration"): ("model.vision_tower", None),
}
#: Why well-known relatives are refused, by the module of transformers.models.
REASONS = {
    "beit": "its attention adds a table of position biases, whose rows tokens would lose",
    "data2vec": "its attention adds a table of position biases, whose rows tokens would lose",
    "swin": "its attention works inside windows, so tokens cannot be removed",
    "swinv2": "its attention works inside windows, so tokens cannot be removed",
    "hiera": "it pools tokens on a grid between stages, so tokens cannot be removed",
    "pvt": "it reshapes tokens to a grid between stages, so tokens cannot be removed",
    "segformer": "it reshapes tokens to a grid between stages, so tokens cannot be removed",
    "timm_wrapper": "it is a door to a timm model; use vtoken.apply(model.timm_model, ...)",
    "llava_next": "it packs several tiles of an image on a grid, which merged tokens no longer have",
    "llava_onevision": "it packs several tiles of an image on a grid, which merged tokens no longer have",
}


class HFAdapter(HostAdapter):
    """transformers' plain-attention image models, recognised by module and class, never by their configuration."""

    name = "transformers ViT, DeiT, CLIP, SigLIP, SigLIP 2, DINOv2 and LLaVA towers"
    package = "transformers"
    hooks = frozenset({"on_block"})

    def tower(self, model: nn.Module) -> Any:
        """The module that runs the image layers."""
        if _known(type(model), TOWERS) is not None:
            return model
        held = _known(type(model), HOLDERS)
        if held is None:
            raise UnsupportedModelError(_refusal(model, _reason(model)))
        tower = model.get_submodule(HOLDERS[held][0])
        if _known(type(tower), TOWERS) is None:
            raise UnsupportedModelError(_refusal(model, f"its image tower is a {type(tower).__qualname__}"))
        return tower

    def spec(self, model: nn.Module) -> HostSpec:
        """Check the tower layer by layer."""
        tower = self.tower(model)
        for module, known in ((tower, TOWERS), (model, HOLDERS)):
            problem = _own_forward(module, known)
            if problem:
                raise UnsupportedModelError(_refusal(model, problem))
        layers = self.blocks(model)
        for name, layer in layers:
            problem = _layer_problem(layer)
            if problem:
                raise UnsupportedModelError(_refusal(model, f"{name} is {problem}"))
        _check_feature_layer(model)
        config = tower.config
        heads = int(config.num_attention_heads)
        return HostSpec(
            name=type(model).__name__,
            depth=len(layers),
            width=int(config.hidden_size),
            num_heads=heads,
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            num_prefix=num_prefix(tower),
            grid=self.grid(model, self.image_size(model)),
            pooling="map" if getattr(tower, "use_head", False) else "token" if num_prefix(tower) else "",
            position="absolute",
            fixed_size=False,
        )

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns."""
        return grid_of(self.tower(model), img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the tower was built for."""
        config = self.tower(model).config
        if config.model_type == "siglip2_vision_model":  # any size: the one of its position table
            side = round(int(config.num_patches) ** 0.5) * int(config.patch_size)
            return side, side
        return pair(config.image_size)

    def channels(self, model: nn.Module) -> int:
        """Channels of its images."""
        return int(self.tower(model).config.num_channels)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The tower's layers."""
        tower = self.tower(model)
        path = ".".join(_mixin(tower)._vtoken_path)
        return [(f"{path}.{i}", layer) for i, layer in enumerate(tower.get_submodule(path))]

    def targets(self, model: nn.Module, methods: dict[str, Method]) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The tower, its layers with their index, and the model itself if it averages the tower's tokens."""
        tower: Any = self.tower(model)
        method = methods.get("on_block")  # None: the tower is only watched
        if isinstance(method, BlockMethod) and method.has_bias():
            refuse_flash(tower.config)
        path = _mixin(tower)._vtoken_path
        found: list[tuple[nn.Module, type, dict[str, Any]]] = [(tower, _mixin(tower), {})]
        found += tower_targets(tower, path)
        found += block_targets(methods, tower.get_submodule(".".join(path)), _parts, num_prefix=num_prefix(tower))
        held = _known(type(model), HOLDERS)
        head = None if held is None else HOLDERS[held][1]
        return found if head is None else [*found, (model, head, {})]

    def run_image(self, model: nn.Module, image: Tensor, **options: Any) -> Any:
        """The model, or its tower where the model also wants text; `options` are for a tower alone."""
        tower: Any = self.tower(model)
        runner: Any = model if model.main_input_name == "pixel_values" else tower
        return runner(**_image_arguments(tower, image, self.image_size(model)), **options)

    def run_watched(self, model: nn.Module, watch: Watch, image: Tensor) -> None:
        """Class attention of the query and key projections."""
        tower = self.tower(model)
        if is_patched(tower):  # from a model around it
            self.run_image(tower, image, vtoken_rows=watch)
        else:
            arguments = _image_arguments(tower, image, self.image_size(tower))
            watched_tower(tower, _mixin(tower)._vtoken_path, watch)(**arguments)

    def check(self, model: nn.Module, methods: dict[str, Method]) -> None:
        """A prompt must have a placeholder for every image token, so their number must be known before."""
        method = methods.get("on_block")
        if isinstance(method, BlockMethod) and not method.exact and hasattr(model.config, "vision_feature_layer"):
            raise ConfigError(
                f"{type(model).__name__} needs prompts with one placeholder per image token, and this method lets the "
                "images decide how many there are; use one whose counts are known, such as vtoken.PiToMe or vtoken.ToMe"
            )

    def num_tokens(self, model: nn.Module, plan: Plan) -> int:
        """For a LLaVA, the placeholders that one image needs."""
        config: Any = model.config
        layer = getattr(config, "vision_feature_layer", None)
        if layer is None:
            return plan.tokens[-1]
        index = layer if isinstance(layer, int) else layer[0]
        drops_class = config.vision_feature_select_strategy == "default"
        return plan.tokens[index] - int(drops_class)


def _image_arguments(tower: Any, image: Tensor, own_size: tuple[int, int]) -> dict[str, Any]:
    """A tower's arguments for images [B, C, H, W]; it was built for those of `own_size`."""
    if tower.config.model_type == "siglip2_vision_model":
        patch, (height, width) = int(tower.config.patch_size), grid_of(tower, (image.shape[2], image.shape[3]))
        whole = image[:, :, : height * patch, : width * patch]
        rows = rearrange(whole, "b c (h y) (w x) -> b (h w) (y x c)", y=patch, x=patch)
        shapes = torch.tensor([[height, width]] * image.shape[0])
        return {"pixel_values": rows, "pixel_attention_mask": None, "spatial_shapes": shapes}
    other_size = (image.shape[2], image.shape[3]) != own_size
    resize = other_size and not tower.config.model_type.startswith("dinov2")  # DINOv2 always fits its positions
    return {"pixel_values": image, **({"interpolate_pos_encoding": True} if resize else {})}


def keys_of(cls: type) -> list[Key]:
    """Where transformers defines `cls` and its bases."""
    found = []
    for base in cls.__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["transformers", "models"] and len(parts) == 4:
            found.append((parts[2], base.__name__))
    return found


def _known(cls: type, table: dict[Key, Any]) -> Key | None:
    return next((key for key in keys_of(cls) if key in table), None)


def _mixin(tower: nn.Module) -> Any:
    key = _known(type(tower), TOWERS)
    assert key is not None
    return TOWERS[key]


def _layer_mixin(layer: Any) -> type:
    key = _known(type(layer), LAYERS)
    assert key is not None
    return MasklessDinoLayerMixin if hasattr(attention_of(layer), "attention") else LAYERS[key]


def _parts(layer: Any) -> tuple[type, Any, type]:
    """The mixin of a layer, its attention and the mixin of that."""
    attn = attention_of(layer)
    return _layer_mixin(layer), attn, NestedAttentionMixin if hasattr(attn, "attention") else AttentionMixin


def _own_forward(module: nn.Module, table: dict[Key, Any]) -> str | None:
    """A user's subclass may do anything around the tower; around the layers it would be bypassed."""
    kind = base_of(type(module))
    key = _known(kind, table)
    if key is None or not forward_is_replaced(module):
        return None
    return f"forward was replaced on the instance of {kind.__qualname__}; subclass it instead"


def _layer_problem(layer: Any) -> str | None:
    kind = base_of(type(layer))
    key = _known(kind, LAYERS)
    if key is None:
        return f"a {kind.__module__}.{kind.__qualname__}, which vtoken does not know"
    known = next(cls for cls in kind.__mro__ if cls.__name__ == key[1])
    own = [
        cls for cls in kind.__mro__[: kind.__mro__.index(known)] if "forward" in vars(cls) and not _wraps(cls, known)
    ]
    if own or forward_is_replaced(layer):
        return f"a {kind.__qualname__} with a forward of its own, which merging would bypass"
    attn = attention_of(layer)
    if not (hasattr(attn, "k_proj") or hasattr(getattr(attn, "attention", None), "key")):
        return f"a {kind.__qualname__} whose attention has no key projection that vtoken knows"
    return None


def _wraps(cls: Any, known: Any) -> bool:
    """Whether the forward of `cls` is the checkpointing wrapper that transformers puts on every subclass of a layer."""
    inner = getattr(cls.forward, "__wrapped__", None)
    return inner is known.forward or inner is getattr(known.forward, "__wrapped__", known)


def _check_feature_layer(model: Any) -> None:
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if isinstance(layers, (list, tuple)) and len(layers) > 1:
        raise UnsupportedModelError(
            _refusal(model, f"it joins the hidden states of layers {list(layers)}, which have different token counts")
        )


def _reason(model: nn.Module) -> str:
    if _known(type(model), LAYERS) is not None:
        return "it is a single layer; pass the model that holds it"
    name = next((key[0] for key in keys_of(type(model))), "")
    return REASONS.get(name, "vtoken does not know what it does with its image tokens")


def _refusal(model: nn.Module, why: str) -> str:
    inner = [(n, type(m).__name__) for n, m in model.named_modules() if n and _known(type(m), TOWERS) is not None]
    hint = ""
    if inner:
        hint = (
            f" It holds a {inner[0][1]}: if whatever reads that tower takes any number of tokens, use "
            f"vtoken.apply(model.{inner[0][0]}, ...)."
        )
    known = ", ".join(sorted({name for _, name in (*TOWERS, *HOLDERS)}))
    return (
        f"cannot reduce the tokens of transformers {type(model).__name__}: {why}. Supported: {known}.{hint} "
        "The model was left as it was."
    )
