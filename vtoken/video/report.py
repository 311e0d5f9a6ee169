"""What a budget did to one video and what that costs (docs/methods/quota.md 10)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vtoken.accounting.prefill import Decoder, prefill_flops
from vtoken.accounting.vision import Tower, tower_flops


@dataclass(frozen=True)
class QuotaReport:
    """Tokens of every frame of one video, and the cost of its prompt before and after.

    FLOPs are 2 per multiply-add, from the models' measures; embedding, projector and head are not counted, nor is a
    decoupler's language model (text only). Attention of the prefill is causal. Where measures are not known (None),
    the cost is None.

    Args:
        scores: of every frame (of every temporal cell, in models that merge frames).
        tokens_per_frame, rows_per_frame: tokens of every frame, and the rows that they lie in.
        budget_requested: tokens asked for.
        default_tokens: that the unmodified model spends on a frame.
        separator_tokens: newlines and the like; not part of the budget.
        sequence_length_before, sequence_length_after: of the whole prompt row.
        decoder: measures of the language model.
        tower: measures of the vision tower.
        patches_per_frame: that the tower sees.
        scorer_flops: of scoring all frames; 0 for given scores, None if not counted: `vtoken.video.scoring_flops` does.
    """

    scores: tuple[float, ...]
    tokens_per_frame: tuple[int, ...]
    rows_per_frame: tuple[int, ...]
    budget_requested: int
    default_tokens: int
    separator_tokens: int
    sequence_length_before: int
    sequence_length_after: int
    decoder: Decoder | None = None
    tower: Tower | None = None
    patches_per_frame: int = 0
    scorer_flops: int | None = None

    @property
    def frames(self) -> int:
        """Frames (or temporal cells) that were looked at, T."""
        return len(self.tokens_per_frame)

    @property
    def frames_kept(self) -> int:
        """Frames with at least one token."""
        return sum(tokens > 0 for tokens in self.tokens_per_frame)

    @property
    def content_tokens(self) -> int:
        """Tokens of all frames, separators not counted."""
        return sum(self.tokens_per_frame)

    @property
    def budget_effective(self) -> int:
        """What of the budget was spent: all of it, unless the frames could not take so much."""
        return self.content_tokens

    @property
    def baseline_content_tokens(self) -> int:
        """What the unmodified model spends on the same frames."""
        return self.frames * self.default_tokens

    @property
    def prefill_flops_before(self) -> int | None:
        """Of the language model over the unmodified prompt."""
        return self._prefill(self.sequence_length_before)

    @property
    def prefill_flops_after(self) -> int | None:
        """Of the language model over the shortened prompt."""
        return self._prefill(self.sequence_length_after)

    @property
    def tower_flops(self) -> int | None:
        """Of the vision tower over all frames; the same before and after."""
        return None if self.tower is None else self.frames * tower_flops(self.tower, self.patches_per_frame)

    def _prefill(self, length: int) -> int | None:
        return None if self.decoder is None else prefill_flops(self.decoder, length, causal=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything, what follows from the rest included, JSON-ready."""
        names = (
            "frames", "frames_kept", "content_tokens", "budget_effective", "baseline_content_tokens",
            "prefill_flops_before", "prefill_flops_after", "tower_flops",
        )  # fmt: skip
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return plain | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        asked = "" if self.budget_effective == self.budget_requested else f" of a budget of {self.budget_requested}"
        lines = [
            f"{self.frames} frames, {self.frames_kept} kept: {self.content_tokens} tokens{asked} "
            f"({self.baseline_content_tokens} without a budget), {self.separator_tokens} separators",
            f"sequence {self.sequence_length_before} -> {self.sequence_length_after}",
        ]
        before, after = self.prefill_flops_before, self.prefill_flops_after
        if before is not None and after is not None:
            lines.append(f"prefill {before / 1e12:.4g} -> {after / 1e12:.4g} TFLOPs")
        if self.tower_flops is not None:
            lines.append(f"vision tower {self.tower_flops / 1e12:.4g} TFLOPs, before and after")
        if self.scorer_flops:
            lines.append(f"scorer {self.scorer_flops / 1e12:.4g} TFLOPs on top")
        return "\n".join(lines)
