"""transformers: the image models of families.py, and the towers inside what holds them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from vtoken.core.host import HostAdapter
from vtoken.core.method import AttentionMethod, BlockMethod, Methods
from vtoken.core.patch import base_of, forward_is_replaced, is_patched
from vtoken.core.spec import HostSpec, Pair, PatchSpec, Plan
from vtoken.core.watch import Watch
from vtoken.errors import ConfigError, UnsupportedModelError
from vtoken.hosts.hidden_states import drops_first, states_read
from vtoken.hosts.tower import block_targets
from vtoken.hosts.transformers.blocks import (
    AttentionMixin,
    MasklessDinoLayerMixin,
    NestedAttentionMixin,
    attention_of,
    refuse_flash,
)
from vtoken.hosts.transformers.entry import MeanHeadMixin, tower_targets
from vtoken.hosts.transformers.families import (
    Known,
    classes,
    family_of,
    grid_of,
    holder_known,
    layer_known,
    layers_of,
    num_prefix,
    pair_known,
    path_of,
    tower_known,
    towers,
    why_not,
)
from vtoken.hosts.transformers.images import Tubes
from vtoken.hosts.transformers.masked import masked_tower, patch_spec, run_masked
from vtoken.hosts.transformers.watched import watched_tower


class HFAdapter(HostAdapter):
    """transformers' plain-attention image models, recognised by module and class, never by their configuration."""

    name = "transformers image towers"
    package = "transformers"
    serves = (BlockMethod, AttentionMethod)
    masked = staticmethod(run_masked)
    masked_tower = staticmethod(masked_tower)

    def supported(self) -> str:
        """Its towers by their class."""
        return f"transformers {', '.join(towers())}, and models that hold one"

    def tower(self, model: nn.Module) -> Any:
        """The module that runs the image layers."""
        known = tower_known(type(model))
        if known is not None:
            if known.name in known.family.why:  # served inside of what holds it alone
                raise UnsupportedModelError(_refusal(model, known.family.why[known.name]))
            return model
        held = holder_known(type(model))
        if held is None:
            raise UnsupportedModelError(_refusal(model, _reason(model)))
        tower = functools.reduce(getattr, held.family.holders[held.name].split("."), model)  # None: it has no such part
        if tower_known(type(tower)) is None:
            why = why_not(type(tower)) or why_not(type(model)) or "which vtoken does not know"
            raise UnsupportedModelError(_refusal(model, f"its image tower is a {type(tower).__qualname__}; {why}"))
        if family_of(tower).images.packed:
            raise UnsupportedModelError(_refusal(model, "it splits the rows of its tower by the sizes of the images"))
        return tower

    def spec(self, model: nn.Module) -> HostSpec:
        """Check the tower layer by layer."""
        tower = self.tower(model)
        for module in (tower, model):
            problem = _own_forward(module)
            if problem:
                raise UnsupportedModelError(_refusal(model, problem))
        layers = self.blocks(model)
        for name, layer in layers:
            problem = _layer_problem(layer)
            if problem:
                raise UnsupportedModelError(_refusal(model, f"{name} is {problem}"))
        if getattr(tower, "pooler", None) is not None and not num_prefix(tower):
            why = "its pooler reads the first patch, which may have merged with others; build it with"
            raise UnsupportedModelError(_refusal(model, f"{why} add_pooling_layer=False"))
        held = holder_known(type(model))
        if held is not None and not num_prefix(tower) and not getattr(model.config, "use_mean_pooling", True):
            why = "its head reads the first tube, which may have merged with others; build it with"
            raise UnsupportedModelError(_refusal(model, f"{why} use_mean_pooling=True"))
        _check_feature_layer(model)
        config, family = tower.config, family_of(tower)
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
            position="rotary" if family.rotary else "absolute",
            fixed_size=family.images.fixed(config),
            class_token=num_prefix(tower) > 0,
        )

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns."""
        return grid_of(self.tower(model), img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the tower was built for."""
        tower = self.tower(model)
        return family_of(tower).images.size(tower.config)

    def channels(self, model: nn.Module) -> int:
        """Channels of its images."""
        return int(self.tower(model).config.num_channels)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The tower's layers."""
        tower = self.tower(model)
        path = ".".join(path_of(tower))
        if functools.reduce(lambda m, name: getattr(m, name, None), path_of(tower), tower) is None:
            raise UnsupportedModelError(_refusal(model, f"this release of transformers keeps no layers in {path}"))
        return [(f"{path}.{i}", layer) for i, layer in enumerate(tower.get_submodule(path))]

    def targets(self, model: nn.Module, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The tower, its layers with their index, and the model itself if it averages the tower's tokens."""
        tower: Any = self.tower(model)
        method: BlockMethod | None = methods.get(BlockMethod)  # None: the tower is only watched
        if method is not None and method.has_bias():
            refuse_flash(tower.config)
        found = tower_targets(tower)
        found += block_targets(methods, layers_of(tower), _parts, num_prefix=num_prefix(tower), sparse=_known(tower))
        held = holder_known(type(model))
        if held is None or held.name not in held.family.averaging:
            return found
        return [*found, (model, MeanHeadMixin, {"_vtoken_tower": held.family.holders[held.name]})]

    def run_image(self, model: nn.Module, image: Tensor, **options: Any) -> Any:
        """The model, or its tower where the model also wants text."""
        tower: Any = self.tower(model)
        runner: Any = model if model.main_input_name == "pixel_values" else tower
        return runner(**_image_arguments(tower, image), **options)

    def logits_and_tokens(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of an image classifier; its last hidden state has not gone through the tower's final norm."""
        tower = self.tower(model)
        norm = next((getattr(tower, name) for name in _NORMS if hasattr(tower, name)), None)
        out = self.run_image(model, images, output_hidden_states=True)
        logits = out.get("logits")
        if norm is None or logits is None or logits.dim() != 2:  # of patches or pixels
            return super().logits_and_tokens(model, images)
        return logits, norm(out["hidden_states"][-1])[:, num_prefix(tower) :]

    def run_watched(self, model: nn.Module, watch: Watch, image: Tensor) -> None:
        """Class attention of the query and key projections."""
        tower = self.tower(model)
        if isinstance(family_of(tower).images, Tubes):
            raise UnsupportedModelError(
                f"{type(model).__name__} takes videos: vtoken cannot read class attention there"
            )
        if is_patched(tower):  # from a LLaVA around it, whose towers are not rotary
            self.run_image(tower, image, vtoken_rows=watch)
        else:
            watched_tower(tower, path_of(tower), watch)(**_image_arguments(tower, image))

    def pair(self, model: nn.Module) -> Pair | None:
        """Of CLIP and its like."""
        return pair_known(type(model))

    def patch_spec(self, model: nn.Module) -> PatchSpec:
        """Of a tower."""
        return super().patch_spec(model) if tower_known(type(model)) is None else patch_spec(model)

    def check(self, model: nn.Module, methods: Methods) -> None:
        """A prompt must have a placeholder for every image token, so their number must be known before."""
        nested = next((a for _, b in self.blocks(model) if not hasattr(a := attention_of(b), "q_proj")), None)
        if AttentionMethod in methods and nested is not None:
            raise UnsupportedModelError(
                f"cannot put connectivity masks into a {type(model).__name__}: in this release of transformers its "
                f"{base_of(type(nested)).__qualname__} holds another attention, and masks are served where one module "
                "has q_proj, k_proj and v_proj. The model was left as it was."
            )
        method: BlockMethod | None = methods.get(BlockMethod)
        if method is not None and not method.exact and states_read(model.config) is not None:
            raise ConfigError(
                f"{type(model).__name__} needs prompts with one placeholder per image token, and this method lets the "
                "images decide how many there are; use one whose counts are known, such as vtoken.PiToMe or vtoken.ToMe"
            )

    def num_tokens(self, model: nn.Module, plan: Plan) -> int:
        """For a LLaVA, the placeholders that one image needs."""
        states = states_read(model.config)
        if states is None:
            return plan.tokens[-1]
        return plan.tokens[states[0]] - int(drops_first(model))


#: What families call the norm behind their last layer.
_NORMS = ("post_layernorm", "layernorm", "norm", "rms_norm")


def _image_arguments(tower: Any, image: Tensor) -> dict[str, Any]:
    return family_of(tower).images.arguments(tower.config, image)


def _layer(layer: Any) -> Known:
    known = layer_known(type(layer))
    assert known is not None
    return known


def _layer_mixin(layer: Any) -> type:
    mixin: Any = _layer(layer).family.mixin
    nested = hasattr(attention_of(layer), "attention")
    return MasklessDinoLayerMixin if nested and mixin._vtoken_takes_mask else mixin


def _parts(layer: Any) -> tuple[type, Any, type]:
    """The mixin of a layer, its attention and the mixin of that."""
    attn = attention_of(layer)
    return _layer_mixin(layer), attn, NestedAttentionMixin if hasattr(attn, "attention") else AttentionMixin


def _known(tower: Any) -> set[type]:
    """The attention classes of a tower's layers, as transformers has them, whose core is called by name."""
    kinds = {cls for layer in layers_of(tower) for cls in base_of(type(attention_of(layer))).__mro__}
    return {cls for cls in kinds if cls.__module__.startswith("transformers.models.") and "forward" in vars(cls)}


def _own_forward(module: nn.Module) -> str | None:
    """A user's subclass may do anything around the tower; around the layers it would be bypassed."""
    if not forward_is_replaced(module):
        return None
    return f"forward was replaced on the instance of {base_of(type(module)).__qualname__}; subclass it instead"


def _layer_problem(layer: Any) -> str | None:
    kind = base_of(type(layer))
    found = layer_known(kind)
    if found is None:
        return f"a {kind.__module__}.{kind.__qualname__}, which vtoken does not know"
    known = next(cls for cls in kind.__mro__ if cls.__name__ == found.name)
    own = [
        cls for cls in kind.__mro__[: kind.__mro__.index(known)] if "forward" in vars(cls) and not _wraps(cls, known)
    ]
    if own or forward_is_replaced(layer):
        return f"a {kind.__qualname__} with a forward of its own, which merging would bypass"
    if getattr(layer, "num_experts", 1) > 1:
        return f"a {kind.__qualname__} of {layer.num_experts} experts, whose choice merged tokens do not carry"
    attn = attention_of(layer)
    if not isinstance(getattr(attn, "k_norm", nn.Identity()), nn.Identity):
        return f"a {kind.__qualname__} whose attention norms its keys, which vtoken reads before that"
    if not (hasattr(attn, "k_proj") or hasattr(getattr(attn, "attention", None), "key")):
        return f"a {kind.__qualname__} whose attention has no key projection that vtoken knows"
    return None


def _wraps(cls: Any, known: Any) -> bool:
    """Whether the forward of `cls` is the checkpointing wrapper that transformers puts on every subclass of a layer."""
    inner = getattr(cls.forward, "__wrapped__", None)
    return inner is known.forward or inner is getattr(known.forward, "__wrapped__", known)


def _check_feature_layer(model: Any) -> None:
    states = states_read(getattr(model, "config", None)) or []
    if len(states) > 1:
        raise UnsupportedModelError(
            _refusal(model, f"it joins the hidden states of layers {states}, which have different token counts")
        )


def _reason(model: nn.Module) -> str:
    if layer_known(type(model)) is not None:
        return "it is a single layer; pass the model that holds it"
    return why_not(type(model)) or "vtoken does not know what it does with its image tokens"


def _refusal(model: nn.Module, why: str) -> str:
    inner = [(n, type(m).__name__) for n, m in model.named_modules() if n and tower_known(type(m)) is not None]
    hint = ""
    if inner:
        hint = (
            f" It holds a {inner[0][1]}: if whatever reads that tower takes any number of tokens, use "
            f"vtoken.apply(model.{inner[0][0]}, ...)."
        )
    return (
        f"cannot reduce the tokens of transformers {type(model).__name__}: {why}. Supported: {', '.join(classes())}."
        f"{hint} The model was left as it was."
    )
