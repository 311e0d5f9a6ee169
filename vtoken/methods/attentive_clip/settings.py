"""The settings of attentive masking; `AttentiveMaskCLIP` trains with them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from vtoken import checks
from vtoken.core.config import MethodConfig, register_method
from vtoken.errors import ConfigError
from vtoken.methods.attentive_clip.heads import NORMS
from vtoken.methods.attentive_clip.mapping import OUTSIDE
from vtoken.methods.attentive_clip.select import Selection


@register_method
@dataclass(frozen=True, kw_only=True)
class AttentiveMasks(Selection, MethodConfig):
    """Settings of CLIP training with attentive masks: `vtoken.AttentiveMaskCLIP(model, settings)`.

    `vtoken.apply` does not take them: they act in a training step, not in a model. The wrapper's random generator is no
    setting, since it cannot be written as JSON.

    Args:
        keep_ratio: share of the patches that the student sees, in (0, 1]; of n units ceil(n * keep_ratio) are kept.
            1 masks nothing and runs no teacher (unless `byol_weight` needs it).
        mode: "topk" keeps the most attended units; "random" any; "sample" draws them with probability ~
            score^(1/temperature); "mix" keeps the best `top_fraction` of those kept and any others; "lowest" keeps the
            least attended, for ablations.
        block: side in patches of the square units that are kept or masked; "auto": 32 pixels, or 1 patch where that
            does not divide the grid.
        top_fraction: of mode "mix", in (0, 1].
        temperature: of mode "sample", above 0.
        layers: blocks of the teacher whose attention counts, with equal weight: "all", "last" or indices, negative
            ones too.
        warmup_steps: optimiser steps without masking at the start.
        teacher_scale: factor on the sides of the teacher's image, in (0, 1]; 0.5 is the efficient variant.
        momentum: of the average after the first steps, in [0, 1]; grows to 1 by a half cosine over `total_steps`.
        total_steps: optimiser steps planned, from 1 on; None: constant momentum.
        simclr_weight: above 0 makes the head of the SimCLR loss between two views. The factor on the loss itself is
            that of `AttentiveMaskLoss`.
        byol_weight: the same for the loss between student and teacher.
        hidden_dim, out_dim, head_norm: widths of the heads, and "batch" or "layer" for their norm.
        ema_text: average the text tower too, for `unwrap(ema=True)`.
        freeze_patch_embed: do not train the patch embedding, as published.
        outside: score of a patch whose centre the teacher's image does not show: "border" takes the nearest score,
            "zeros" takes 0 as the published code does. Only for boxes of your own: `MultiViewCrop` covers every view.

    Raises:
        ConfigError: for values out of range; for those that do not fit the model when it is wrapped.

    Example:
        >>> import vtoken
        >>> settings = vtoken.AttentiveMasks(keep_ratio=0.25, layers="last")
        >>> vtoken.config_from_dict(settings.to_dict()) == settings
        True

    Source: arXiv 2212.08653; docs/methods/attentive_clip.md 9.
    """

    method: ClassVar[str] = "attentive_clip"
    part: ClassVar[str] = "training"

    layers: str | tuple[int, ...] = "all"
    warmup_steps: float = 0
    teacher_scale: float = 1.0
    momentum: float = 0.996
    total_steps: float | None = None
    simclr_weight: float = 0.0
    byol_weight: float = 0.0
    hidden_dim: int = 4096
    out_dim: int = 256
    head_norm: str = "batch"
    ema_text: bool = False
    freeze_patch_embed: bool = False
    outside: str = "border"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        for name, most in {"momentum": 1, "simclr_weight": None, "byol_weight": None}.items():
            object.__setattr__(self, name, checks.number(owner, name, getattr(self, name), 0, most))
        for name, least in {"warmup_steps": 0, "total_steps": 1}.items():
            if name != "total_steps" or self.total_steps is not None:
                object.__setattr__(self, name, _steps(owner, name, getattr(self, name), least))
        what = "the factor on the sides of the teacher's image, "
        object.__setattr__(self, "teacher_scale", checks.share(owner, "teacher_scale", self.teacher_scale, what=what))
        for name in ("hidden_dim", "out_dim"):
            object.__setattr__(self, name, checks.whole(owner, name, getattr(self, name), 1))
        for name in ("ema_text", "freeze_patch_embed"):
            checks.flag(owner, name, getattr(self, name))
        checks.choice(owner, "head_norm", self.head_norm, tuple(NORMS))
        checks.choice(owner, "outside", self.outside, OUTSIDE)
        object.__setattr__(self, "layers", _layers(owner, self.layers))

    def build(self, depth: int) -> NoReturn:
        """There is nothing to build: raises ConfigError that says what takes these settings."""
        raise ConfigError(
            f"{self.method} patches no model and takes no token from one outside training: a CLIP is trained with it "
            "as vtoken.AttentiveMaskCLIP(model, ...), which takes these settings or their values by name; its "
            "step_macs() counts a training step"
        )


def _steps(owner: str, name: str, value: Any, least: int) -> float:
    """A number of steps, which need not be whole (a share of all steps, say); a whole one is an int."""
    steps = checks.number(owner, name, value, least)
    return int(steps) if steps.is_integer() else steps


def _layers(owner: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value in ("all", "last"):
        return value
    entries = checks.several(tuple(value) if isinstance(value, Set) else value)
    found = None if not entries else checks.whole_numbers(entries)
    if found is None:
        raise ConfigError(f'{owner}(layers={value!r}): must be "all", "last" or a list of block indices')
    return found
