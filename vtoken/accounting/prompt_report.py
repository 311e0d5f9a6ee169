"""`vtoken.prompt_report`: what one prompt with images costs, from the tower to the cache, before and after a method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vtoken import checks
from vtoken.accounting.prefill import Decoder, kv_cache_bytes, prefill_macs
from vtoken.accounting.report import count_macs
from vtoken.accounting.shadow import meta_copy
from vtoken.core.apply import Config, apply, given_or_carried
from vtoken.core.counts import pixels
from vtoken.core.host import find_adapter, host_of
from vtoken.errors import ConfigError


@dataclass(frozen=True)
class PromptCost:
    """One prompt: image tokens of all its images, multiply-adds by part, bytes of the cache.

    `tower` includes the patch embedding and the method's own work, `prefill` counts image and text tokens, attention in
    full, without the head.
    """

    image_tokens: int
    tower_macs: int
    projector_macs: int
    prefill_macs: int
    cache_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all parts."""
        return self.tower_macs + self.projector_macs + self.prefill_macs


@dataclass(frozen=True)
class PromptReport:
    """What a multimodal prompt costs without and with a method; 1 multiply-add (MAC) = 2 FLOPs.

    Args:
        exact: False where newlines of a detail grid are kept by content: then `after` is the most it can be.
    """

    model: str
    method: dict[str, Any]
    image_size: tuple[int, int]
    images: int
    crops: int
    text_tokens: int
    before: PromptCost
    after: PromptCost
    exact: bool

    @property
    def flops_factor(self) -> float:
        """FLOPs of all parts, before / after."""
        return self.before.macs / self.after.macs

    @property
    def prefill_factor(self) -> float:
        """FLOPs of the language model's first pass, before / after."""
        return self.before.prefill_macs / self.after.prefill_macs

    def to_dict(self) -> dict[str, Any]:
        """Everything, totals included, JSON-ready."""
        totals = {"flops_factor": self.flops_factor, "prefill_factor": self.prefill_factor}
        return asdict(self) | totals | {"image_size": list(self.image_size)}

    def __str__(self) -> str:
        height, width = self.image_size
        crops = f", {self.crops} crops each" if self.crops > 1 else ""
        rows = [
            f"{self.model}, {self.method['method']}, {self.images} image(s) of {height}x{width}{crops}, "
            f"{self.text_tokens} text tokens" + ("" if self.exact else "; after: at most"),
            f"{'':>14} {'before':>11} {'after':>11}",
            f"{'image tokens':>14} {self.before.image_tokens:>11} {self.after.image_tokens:>11}",
        ]
        for part in ("tower", "projector", "prefill"):
            name = f"{part}_macs"
            before, after = getattr(self.before, name) / 1e9, getattr(self.after, name) / 1e9
            rows.append(f"{part + ' GMACs':>15}{before:>11.2f} {after:>11.2f}")
        rows.append(f"{'total GMACs':>15}{self.before.macs / 1e9:>11.2f} {self.after.macs / 1e9:>11.2f}")
        rows.append(
            f"{'cache MiB':>15}{self.before.cache_bytes / 2**20:>11.1f} {self.after.cache_bytes / 2**20:>11.1f}"
        )
        rows.append(f"FLOPs factor {self.flops_factor:.2f}, of the prefill alone {self.prefill_factor:.2f}")
        return "\n".join(rows)


def prompt_report(
    model: nn.Module,
    config: Config | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    images: int = 1,
    text_tokens: int = 60,
    bytes_per_element: int = 2,
    **options: Any,
) -> PromptReport:
    """Count what a method saves on a prompt; no weight is read and the model is not changed.

    Args:
        model: a supported multimodal model, patched or not; the meta device will do.
        config: settings of a method in the prompt, with or without one in the tower; None: those that are applied.
        image_size: pixels, one side or (height, width), before it is cut into crops; None: the tower's own.
        images: in the prompt.
        text_tokens: in the prompt.
        bytes_per_element: of the cache.

    Raises:
        UnsupportedModelError, ConfigError: as `vtoken.apply`; ConfigError if no method acts in the prompt, and for
            counts that no prompt has.
        ShapeError: if the image size is none.

    Example:
        >>> import torch, transformers, vtoken
        >>> with torch.device("meta"):  # no weights are needed to count
        ...     model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig())
        >>> report = vtoken.prompt_report(model, vtoken.VTCCLS(num_tokens=64))
        >>> report.before.image_tokens, report.after.image_tokens
        (576, 64)
    """
    images = checks.whole("prompt_report", "images", images, 1)
    text_tokens = checks.whole("prompt_report", "text_tokens", text_tokens, 0)
    bytes_per_element = checks.whole("prompt_report", "bytes_per_element", bytes_per_element, 1)
    configs = given_or_carried(model, config, options)
    if not any(c.part == "prompt" for c in configs):
        raise ConfigError("prompt_report needs a method that acts in the prompt, such as vtoken.VTCCLS(num_tokens=64)")
    adapter: Any = find_adapter(model, "prompt")
    size = adapter.image_size(model) if image_size is None else pixels(image_size)
    in_tower = tuple(c for c in configs if c.part == "tower")
    full, pruned = adapter.count(model, (), size), adapter.count(model, configs, size)
    tower = adapter.tower_macs(model, size) or tower_macs(model, in_tower, size)
    decoder = Decoder.of(model)

    def cost(tokens: int, tower_work: int, projected: int) -> PromptCost:
        length = images * tokens + text_tokens
        return PromptCost(
            image_tokens=images * tokens,
            tower_macs=images * tower_work,
            projector_macs=images * projected * adapter.projector_macs(model),
            prefill_macs=prefill_macs(decoder, length),
            cache_bytes=kv_cache_bytes(decoder, length, bytes_per_element),
        )

    scoring = full.crops * adapter.scoring_macs(model, configs, size)
    described = [c.to_dict() for c in configs]
    return PromptReport(
        model=type(model).__name__,
        method=described[0] if len(described) == 1 else {"method": "+".join(c.method for c in configs)},
        image_size=size,
        images=images,
        crops=full.crops,
        text_tokens=text_tokens,
        before=cost(full.full, full.crops * tower[0], full.crops * full.rows),
        after=cost(pruned.kept, full.crops * tower[1] + scoring, full.crops * pruned.rows),
        exact=pruned.exact,
    )


def tower_macs(model: Any, configs: Config, size: tuple[int, int]) -> tuple[int, int]:
    """Multiply-adds of the image tower on one image or crop, without and with methods in it."""
    prompts: Any = find_adapter(model, "prompt")
    shadow = meta_copy(prompts.tower(model))
    host = host_of(shadow)
    crops = hasattr(model.model, "pack_image_features")
    pixel_size = (host.adapter.channels(shadow), *(host.image_size() if crops else size))
    before = count_macs(host, pixel_size)
    if not configs:
        return before, before
    apply(shadow, configs)
    return before, count_macs(host, pixel_size)
