"""Writes docs/models.md: which classes and which timm architectures take which methods, found by asking them.

    python docs/make_models.py

Every model is built without weights (on the meta device) with the defaults of its configuration and given every method.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from torch import nn

import vtoken
from vtoken.core.config import example
from vtoken.core.host import host_of
from vtoken.hosts.names import build_weightless
from vtoken.hosts.transformers.families import classes
from vtoken.hosts.unserved import FAMILIES

PAGE = Path(__file__).with_name("models.md")
#: Columns: what a method is called here, and whether a model takes it. Methods that merge or drop go together.
MERGING = ("pitome", "tome", "random_merge", "random_prune", "stride")
PROMPTS = ("divprune", "visionzip", "random_tokens", "uniform_tokens", "pooled_tokens")
INTRO = """# Which models take which methods

Written by `python docs/make_models.py`, which builds every model without weights and asks it; a test fails when the
page is no longer true. "Merging" stands for {merging}; "other prompt methods"
for {prompts}; CDPruner besides takes an instruction, whose token the model must have or the caller give.

`python -m vtoken models 'swin*' --why` says why a name is refused, and `vtoken.register_adapter` adds a family of your
own. A subclass counts as its base as long as it leaves the known `forward` alone. A model that is not listed may still
hold one that is: the error names it ("use model.vision_model").
"""


def takes(model: nn.Module, method: str) -> bool:
    """Whether `vtoken.apply` accepts a model for a method."""
    try:
        vtoken.apply(model, example(method))
    except (vtoken.UnsupportedModelError, vtoken.ConfigError):
        return False
    vtoken.remove(model)
    return True


def has_budget(model: nn.Module) -> bool:
    """Whether `vtoken.QuotaVideoModel` takes a model."""
    try:
        vtoken.QuotaVideoModel(model, budget=0.25)
    except vtoken.UnsupportedModelError:
        return False
    return True


def trains(model: nn.Module) -> bool:
    """Whether `vtoken.AttentiveMaskCLIP` takes a model."""
    try:
        vtoken.AttentiveMaskCLIP(model, mode="random")
    except vtoken.UnsupportedModelError:
        return False
    return True


COLUMNS: dict[str, Callable[[Any], bool]] = {
    "Merging": lambda model: all(takes(model, method) for method in MERGING),
    "Sparsifiner": lambda model: takes(model, "sparsifiner"),
    "VTC-CLS": lambda model: takes(model, "vtc_cls"),
    "Other prompt methods": lambda model: all(takes(model, method) for method in PROMPTS),
    "QuoTA": has_budget,
    "Attentive-mask CLIP": trains,
}


#: Classes over the maps of a backbone that their default configurations take from families without tokens.
OVER_MAPS = ("DPTForDepthEstimation", "UperNetForSemanticSegmentation", "ZoeDepthForDepthEstimation")
#: Classes whose default configurations name a tower that cannot be built.
UNBUILDABLE = ("AyaVisionForConditionalGeneration",)


def _dino_maps() -> Any:
    return transformers.Dinov2Config(out_features=["stage3", "stage6", "stage9", "stage12"])


def transformers_models() -> Iterable[tuple[str, nn.Module]]:
    """Every class that a table of the hosts names."""
    prompts = {key for family in FAMILIES for key in family.models}
    for name in sorted({*classes(), *(name for _, name in prompts)}):
        cls = getattr(transformers, name, None)
        if cls is not None:  # older releases lack some
            with torch.device("meta"):
                if name == "AyaVisionForConditionalGeneration":  # whose own default divides no width by its heads
                    vision = transformers.SiglipVisionConfig(hidden_size=1152, num_attention_heads=16)
                    yield name, cls(cls.config_class(vision_config=vision))
                elif name in OVER_MAPS:
                    yield f"{name} over DINOv2", cls(cls.config_class(backbone_config=_dino_maps()))
                elif name in UNBUILDABLE:
                    yield name, cls(cls.config_class(vision_config=transformers.SiglipVisionConfig()))
                else:
                    yield name, cls(cls.config_class())
    with torch.device("meta"):
        config = transformers.LlavaConfig(
            vision_config=transformers.PixtralVisionConfig(),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        yield "LlavaForConditionalGeneration over Pixtral", transformers.LlavaForConditionalGeneration(config)


#: transformers' auto-mappings of whatever sees images.
MAPPINGS = (
    "IMAGE", "IMAGE_CLASSIFICATION", "BACKBONE", "ZERO_SHOT_IMAGE_CLASSIFICATION", "DEPTH_ESTIMATION",
    "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "OBJECT_DETECTION", "MASK_GENERATION",
    "VIDEO_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT",
)  # fmt: skip
_DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "n_layer")
_UNKNOWN = "vtoken does not know what it does"


def survey() -> dict[str, list[str]]:
    """The classes of transformers' auto-mappings that can be built from a small default configuration, by the answer.

    Returns:
        Names under "yes", "reason" (refused with one of its own), "part" (the refusal names a part that can be patched)
        and "unknown".
    """
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for mapping in MAPPINGS:
        for found in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            names.update([found] if isinstance(found, str) else found)
    answers: dict[str, list[str]] = {"yes": [], "reason": [], "part": [], "unknown": []}
    for name in sorted(names):
        model = _small(getattr(transformers, name, None))
        if model is not None:
            answers[_answer(model)].append(name)
    return answers


def _small(cls: Any) -> nn.Module | None:
    """A model of a class with few layers and no weights; None if its default configuration makes none."""
    for shrink in (True, False):
        try:
            config = cls.config_class()
            if shrink:
                _shrink(config)
            with torch.device("meta"):
                model: nn.Module = cls(config)
        except Exception:  # whatever its library raises there
            continue
        return model
    return None


def _shrink(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value)
        elif name in _DEPTHS and isinstance(value, int):
            setattr(config, name, min(value, 2))


def _answer(model: nn.Module) -> str:
    try:
        host_of(model)
    except vtoken.UnsupportedModelError as error:
        if _UNKNOWN not in str(error):
            return "reason"
        return "part" if "It holds a" in str(error) else "unknown"
    return "yes"


def told(answers: dict[str, list[str]]) -> str:
    """What the page says of the survey."""
    count = {answer: len(names) for answer, names in answers.items()}
    text = (
        f"Of the {sum(count.values())} classes in transformers' auto-mappings for images and videos that their default "
        f"configuration builds, tower methods work on {count['yes']}; {count['reason']} are refused with a reason of "
        f"their own, {count['part']} with the name of a part that can be patched, and of {count['unknown']} vtoken "
        "only says that it does not know what they do with their tokens."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


def open_clip_models() -> Iterable[tuple[str, nn.Module]]:
    """One small model of every class and kind of tower."""
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token",
             "timm_proj": "linear", "image_size": 224}  # fmt: skip
    text = {"layers": 1, "width": 64, "heads": 2}
    with torch.device("meta"):
        yield "CLIP", open_clip.CLIP(32, vision, text)
        yield "CustomTextCLIP", open_clip.CustomTextCLIP(32, vision, text)
        yield "CLIP with a timm trunk", open_clip.CLIP(32, trunk, text)
        yield "CoCa", open_clip.CoCa(32, text, text, vision | {"attentional_pool": True})
        yield "VisionTransformer", open_clip.CLIP(32, vision, text).visual


def timm_names(kind: str) -> dict[str, list[str]]:
    """Supported names by file of timm; of "sparsifiner" those that take it."""
    found: dict[str, list[str]] = {}
    for name in vtoken.supported():
        if kind == "merging" or takes(build_weightless(name), kind):
            found.setdefault(_file_of(name), []).append(name)
    return found


def _file_of(name: str) -> str:
    return str(timm.model_entrypoint(name).__module__.rpartition(".")[2])


def table(models: Iterable[tuple[str, nn.Module]]) -> str:
    """A row for every class."""
    rows = [f"| class | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, model in models:
        rows.append(f"| `{name}` | {' | '.join('yes' if ask(model) else '' for ask in COLUMNS.values())} |")
    return "\n".join(rows)


def tables() -> dict[str, str]:
    """What is cheap to make: the tables of classes, by their heading."""
    return {
        f"transformers {transformers.__version__}": table(transformers_models()),
        f"open_clip {open_clip.__version__}": table(open_clip_models()),
    }


def names() -> str:
    """The names of timm, about a minute."""
    merging, sparse = timm_names("merging"), timm_names("sparsifiner")
    lines = []
    for file, found in sorted(merging.items()):
        both = [name for name in found if name in sparse.get(file, ())]
        rest = [name for name in found if name not in both]
        lines.append(f"### {file}.py: {len(found)} names")
        for title, some in (("Merging and Sparsifiner", both), ("Merging", rest)):
            if some:
                lines.append(textwrap.fill(f"{title}: {', '.join(some)}.", 118, break_on_hyphens=False))
    return "\n\n".join(lines)


def page() -> str:
    """All of docs/models.md."""
    merging = ", ".join(type(example(method)).__name__ for method in MERGING)
    prompts = ", ".join(type(example(method)).__name__ for method in PROMPTS)
    parts = [INTRO.format(merging=merging, prompts=prompts)]
    for title, text in tables().items():
        parts.append(f"## {title}\n\n{text}\n")
        if title.startswith("transformers"):
            parts.append(f"{told(survey())}\n")
    parts.append(f"## timm {timm.__version__}\n\nBy the file of timm that makes them.\n\n{names()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
