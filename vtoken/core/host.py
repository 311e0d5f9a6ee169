"""What vtoken knows of a family of models, and how the family of a model is found."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtoken.core.config import MethodConfig
from vtoken.core.method import AttentionMethod, BlockMethod, Method, Methods
from vtoken.core.patch import PREDICTOR
from vtoken.core.spec import HostSpec, ImageTokens, Pair, PatchSpec, Plan
from vtoken.errors import ConfigError, UnsupportedModelError, VTokenError


class HostAdapter:
    """Knowledge of one family. Subclass it and pass the class to `vtoken.register_adapter` to support your own."""

    #: Shown in messages and in `python -m vtoken models`.
    name: str = ""
    #: Top-level package of the classes that it knows.
    package: str = ""
    #: The kinds of methods (see `Method.kind`) that it can serve.
    serves: tuple[type[Method], ...] = (BlockMethod,)
    #: The part of a model that it knows; see MethodConfig.part.
    part: str = "tower"

    def supported(self) -> str:
        """What it supports, for messages to whoever brings something else; its name unless it knows better."""
        return self.name

    def matches(self, model: nn.Module) -> bool:
        """Whether the model belongs to this family; cheap, by package; `spec` refuses what is unknown."""
        return any(cls.__module__.partition(".")[0] == self.package for cls in type(model).__mro__)

    def spec(self, model: nn.Module) -> HostSpec:
        """The model's measures; raises UnsupportedModelError, with the reason, if any part of it is unknown."""
        raise NotImplementedError

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns of an image of `img_size` (height, width) pixels."""
        raise NotImplementedError

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and modules of the blocks, in order."""
        raise NotImplementedError

    def targets(
        self, model: nn.Module, methods: Methods
    ) -> list[tuple[nn.Module, type, dict[str, Any]]]:  # fmt: skip
        """What `patch` needs: module, mixin, attributes; the model itself first."""
        raise NotImplementedError

    def check(self, model: nn.Module, methods: Methods) -> None:
        """Raise ConfigError if the methods do not fit the model in a way that only its family knows."""

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """The model's own input height and width in pixels; raises UnsupportedModelError if it has none."""
        raise UnsupportedModelError(
            f"{self.name}: {type(self).__name__} tells no image size of its own. Say which is meant (img_size=..., or "
            "input_size=... of vtoken.report), or give the adapter image_size(model)"
        )

    def channels(self, model: nn.Module) -> int:
        """Channels of the model's images."""
        return int(getattr(model, "in_chans", 3))

    def num_tokens(self, model: nn.Module, plan: Plan) -> int:
        """Tokens of one image that the model hands on, of those that `plan` counts in its tower."""
        return plan.tokens[-1]

    def count(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> ImageTokens:
        """What one image of `size` (height, width) costs in tokens; for adapters of the part "prompt"."""
        raise NotImplementedError

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """Multiply-adds that a method in the prompt spends on one image or crop; for adapters of the part "prompt"."""
        raise NotImplementedError

    def run_watched(self, model: nn.Module, watch: Any, image: Any) -> None:
        """Run the tower on [B, C, H, W] with the attention of its blocks read by a `vtoken.core.watch.Watch`."""
        raise UnsupportedModelError(f"{self.name}: vtoken cannot read class attention there")

    def pair(self, model: nn.Module) -> Pair | None:
        """Where a model that compares images with texts keeps its parts; None if the model does not."""
        return None

    def patch_spec(self, model: nn.Module) -> PatchSpec:
        """What is known of the patches of a tower of which `masked` can leave some out.

        Raises:
            UnsupportedModelError: if it cannot, with the reason.
            ConfigError: if the tower drops patches itself.
        """
        raise UnsupportedModelError(f"{self.name}: vtoken cannot leave out patches there")

    def masked(self, model: nn.Module, images: Any, rows: Any, watch: Any = None) -> tuple[Any, Any]:
        """Features of images of whose tokens only some enter the blocks.

        Args:
            model: the tower that `patch_spec` was asked for.
            images: [B, C, H, W], of any whole number of patches; positions are resampled for the call.
            rows: tokens that go on, behind the position embedding, prefix tokens among them, [B, T]; None: all.
            watch: a `vtoken.core.watch.Watch` that reads class attention on the way.

        Returns:
            Pooled features before the projection, [B, w], and behind it, [B, E].

        Raises:
            UnsupportedModelError: if the tower carries a method.
        """
        raise UnsupportedModelError(f"{self.name}: vtoken cannot leave out patches there")

    def logits_and_tokens(self, model: nn.Module, images: Any) -> tuple[Any, Any]:
        """Logits [B, classes] and patch tokens behind the final norm [B, N, C], of images [B, C, H, W].

        Raises:
            UnsupportedModelError: if the model is no classifier, or the family cannot tell.
        """
        raise UnsupportedModelError(
            f"{self.name}: vtoken cannot tell the logits and patch tokens of a {type(model).__name__}, as it can for "
            "timm's models and the image classifiers of transformers; make TeacherOutput from your own frozen model"
        )

    def run_image(self, model: nn.Module, image: Any) -> Any:
        """Run the model's image part on [B, C, H, W]; for models whose forward wants more than an image."""
        return model(image)


# By the part of a model: top-level package of the classes that an adapter knows, module, adapter; imported only when
# such a model arrives.
_BUILTIN = {
    "tower": (
        ("timm", "vtoken.hosts.timm.adapter", "TimmAdapter"),
        ("open_clip", "vtoken.hosts.open_clip.adapter", "OpenClipAdapter"),
        ("transformers", "vtoken.hosts.transformers.timm_wrapper", "TimmWrapperAdapter"),
        ("transformers", "vtoken.hosts.transformers.adapter", "HFAdapter"),
    ),
    "prompt": (
        ("transformers", "vtoken.hosts.pixtral.family", "LlavaPixtral"),  # asked first: it looks at the tower
        ("transformers", "vtoken.hosts.llava.adapter", "LlavaAdapter"),
        ("transformers", "vtoken.hosts.llava.video", "Onevision"),
        ("transformers", "vtoken.hosts.llava.video", "NextVideo"),
        ("transformers", "vtoken.hosts.video_llama.family", "VideoLlama3"),
        ("transformers", "vtoken.hosts.pixtral.family", "Mistral3"),
        ("transformers", "vtoken.hosts.qwen.family", "QwenVL"),
        ("transformers", "vtoken.hosts.qwen.glm", "Glm4V"),
        ("transformers", "vtoken.hosts.internvl.family", "InternVL"),
        ("transformers", "vtoken.hosts.idefics.family", "Idefics"),
        ("transformers", "vtoken.hosts.gemma.gemma3", "Gemma3"),
        ("transformers", "vtoken.hosts.gemma.paligemma", "PaliGemma"),
        ("transformers", "vtoken.hosts.cohere.family", "Cohere2Vision"),
        ("transformers", "vtoken.hosts.cohere.family", "AyaVision"),
        ("transformers", "vtoken.hosts.unserved", "UnservedPrompts"),
    ),
}
_registered: list[HostAdapter] = []
#: What adapters of version 0.1 said instead of `serves`.
_HOOKS = {"on_block": BlockMethod, "on_attention": AttentionMethod}
#: What an adapter of each part cannot do without, of what HostAdapter leaves open.
_NEEDED = {"tower": ("spec", "grid", "blocks", "targets"), "prompt": ("spec", "targets", "count")}


@dataclass(frozen=True, eq=False)
class Host:
    """A model whose structure the adapter of its family has checked; see `host_of`.

    Args:
        adapter: of the family.
        model: the model.
        spec: its measures.
    """

    adapter: HostAdapter
    model: nn.Module
    spec: HostSpec

    def of(self, twin: nn.Module) -> Host:
        """The same of a copy of the model, which has its structure."""
        return Host(self.adapter, twin, self.spec)

    def grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns of an image of `img_size` (height, width) pixels."""
        return self.adapter.grid(self.model, img_size)

    def image_size(self) -> tuple[int, int]:
        """The model's own input height and width in pixels."""
        height, width = self.adapter.image_size(self.model)
        return height, width

    def targets(self, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """What `patch` needs, learned parts of an attention method included; the model itself first."""
        found = self.adapter.targets(self.model, methods)
        for module, _, attributes in found:
            method = attributes.get("_vtoken_method")
            if method is not None:
                like = next(module.parameters())
                predictor = method.predictor(attributes["_vtoken_index"], self.spec, like)
                attributes[PREDICTOR] = predictor.train(module.training)
        return found


def register_adapter(adapter: type[HostAdapter]) -> type[HostAdapter]:
    """Make vtoken ask your adapter before its own; usable as a class decorator.

    Raises:
        ConfigError: if it is no class of adapters, says of no model that it matches, or lacks a method that its part
            of a model needs; nothing is registered.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, HostAdapter)):
        raise ConfigError(f"register_adapter takes a subclass of vtoken.HostAdapter, got {adapter!r}")
    if adapter.part not in _NEEDED:
        raise ConfigError(f"{adapter.__name__}.part={adapter.part!r} is no part of a model: {', '.join(_NEEDED)}")
    missing = [n for n in _NEEDED[adapter.part] if getattr(adapter, n) is getattr(HostAdapter, n)]
    if adapter.matches is HostAdapter.matches and not adapter.package:
        missing.append("package (or matches)")
    if missing:
        raise ConfigError(f"{adapter.__name__} lacks {', '.join(missing)}; see vtoken.HostAdapter for what each gives")
    hooks: frozenset[str] | None = getattr(adapter, "hooks", None)
    if hooks is not None and "serves" not in vars(adapter):
        warnings.warn(f"{adapter.__name__}.hooks is now called serves and holds classes: see vtoken.HostAdapter",
                      DeprecationWarning, stacklevel=2)  # fmt: skip
        adapter.serves = tuple([kind for hook, kind in _HOOKS.items() if hook in hooks])
    try:
        made = adapter()
    except TypeError as error:
        raise ConfigError(f"{adapter.__name__}() cannot be made without arguments: {error}") from error
    if all(type(known) is not adapter for known in _registered):
        _registered.append(made)
    return adapter


def forget_adapter(adapter: type[HostAdapter]) -> None:
    """Undo `register_adapter`."""
    _registered[:] = [known for known in _registered if type(known) is not adapter]


def registered() -> tuple[HostAdapter, ...]:
    """The adapters that `register_adapter` added, in the order in which they are asked."""
    return tuple(_registered)


def find_adapter(model: nn.Module, part: str = "tower") -> HostAdapter:
    """The adapter of the model's family, for one part of the model.

    Raises:
        UnsupportedModelError: if there is none.
        VTokenError: if the model is wrapped or compiled; names the module to use instead.
    """
    refuse_wrappers(model)
    adapter = matching_adapter(model, part)
    if adapter is not None:
        return adapter
    if part == "prompt":
        raise UnsupportedModelError(
            f"cannot shorten the prompt of {type(model).__module__}.{type(model).__qualname__}: it is no multimodal "
            f"model that vtoken knows. Supported: {_supported(part)}.{inner_hint(model, part)} "
            "vtoken.register_adapter adds your own. The model was left as it was."
        )
    raise UnsupportedModelError(
        f"cannot reduce the tokens of {type(model).__module__}.{type(model).__qualname__}: no adapter knows this "
        f"class. Supported hosts: {_supported(part)}.{inner_hint(model)} "
        "`python -m vtoken models` lists names; vtoken.register_adapter adds your own. The model was left as it was."
    )


def matching_adapter(model: nn.Module, part: str = "tower") -> HostAdapter | None:
    """The adapter of the model's family, for one part of the model; None if there is none."""
    known = [*(a for a in _registered if a.part == part), *_builtin_adapters(model, part)]
    return next((adapter for adapter in known if adapter.matches(model)), None)


def _supported(part: str) -> str:
    """What the adapters of installed libraries know, in their own words."""
    known = [entry for entry in _BUILTIN[part] if importlib.util.find_spec(entry[0]) is not None]
    told = [getattr(importlib.import_module(module), name)().supported() for _, module, name in known]
    return "; ".join(filter(None, told))


def keys_of(cls: type) -> list[tuple[str, str]]:
    """Module of `transformers.models` and name of a class and its bases."""
    found = []
    for base in cls.__mro__:
        parts = base.__module__.split(".")
        if parts[:2] == ["transformers", "models"] and len(parts) == 4:
            found.append((parts[2], base.__name__))
    return found


def host_of(model: nn.Module, part: str = "tower") -> Host:
    """One part of a model, its structure checked.

    Raises:
        UnsupportedModelError: if no adapter knows it, or tokens cannot be taken from it, with the reason.
        VTokenError: if the model is wrapped or compiled; names the module to use instead.
    """
    adapter = find_adapter(model, part)
    return Host(adapter, model, adapter.spec(model))


def inner_hint(model: nn.Module, part: str = "tower") -> str:
    """Names the supported model inside a wrapper, if there is one; a sentence for messages."""
    for name, module in model.named_modules():
        for adapter in _builtin_adapters(module, part) if name else ():
            if not adapter.matches(module):
                continue
            try:
                adapter.spec(module)
            except UnsupportedModelError:
                continue
            return f" It holds a supported {type(module).__name__}: use model.{name}."
    return ""


def _builtin_adapters(model: nn.Module, part: str) -> list[HostAdapter]:
    # Modules only: peft's wrapper inherits from a mixin of transformers.
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__ if issubclass(cls, nn.Module)}
    found = [entry for entry in _BUILTIN[part] if entry[0] in packages]
    return [getattr(importlib.import_module(module), name)() for _, module, name in found]


def refuse_wrappers(model: object) -> None:
    """Raise for anything that is not a plain module, and name the plain module inside it."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise VTokenError(
            f"apply before compiling: got {type(model).__name__}; use vtoken.apply(model._orig_mod, ...), then compile"
        )
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise VTokenError(
            f"apply before wrapping: got {type(model).__name__}; use vtoken.apply(model.module, ...) and wrap again"
        )
    if type(model).__module__.startswith("torch.jit"):
        raise UnsupportedModelError("scripted and traced modules cannot be patched; apply to the module they came from")


def refuse_compiled(model: nn.Module, asked: str = "apply") -> None:
    """Raise for a model of which a part was compiled in place: its graphs are those of the classes it has now.

    Args:
        asked: what comes first, for the message.
    """
    compiled = next((name or "the model" for name, m in model.named_modules() if m._compiled_call_impl is not None), "")
    if compiled:
        raise VTokenError(
            f"{asked} before compiling: {compiled} was compiled in place (module.compile()). Set its "
            f"_compiled_call_impl to None, {asked}, and compile it again"
        )
