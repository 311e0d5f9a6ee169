"""Reports of the videos of one call (docs/methods/quota.md 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vtoken.accounting.prefill import Decoder
from vtoken.accounting.vision import Tower
from vtoken.errors import ConfigError
from vtoken.hosts.video.adapter import VideoAdapter, VideoLayout
from vtoken.video.report import QuotaReport
from vtoken.video.tokens import VideoTokens


def reports(
    model: Any,
    adapter: VideoAdapter,
    given: dict[str, Any],
    call: dict[str, Any],
    layouts: Sequence[VideoLayout],
    *,
    scores: Sequence[Sequence[float]],
    spent: Sequence[int],
    videos: Sequence[VideoTokens],
    scoring: int | None,
) -> tuple[QuotaReport, ...]:
    """One report per video.

    Args:
        given, call: the call before and after its prompt was rebuilt.
        spent: budgets that were asked for.
        scoring: FLOPs of the scorer, if known.
    """
    ids = given["input_ids"]
    before, after = _lengths(given), _lengths(call)
    decoder, tower = _measured(Decoder, model), _measured(Tower, model)
    found = []
    for i, row in enumerate(_rows(ids, adapter.placeholder_id(model), layouts)):
        lines = [len(rows) for rows in videos[i].rows]
        found.append(
            QuotaReport(
                scores=tuple(scores[i]),
                tokens_per_frame=videos[i].counts,
                rows_per_frame=tuple(lines),
                budget_requested=spent[i],
                default_tokens=layouts[i].default_tokens,
                separator_tokens={"none": 0, "video": 1, "row": sum(lines)}[adapter.newline],
                sequence_length_before=before[row],
                sequence_length_after=after[row],
                decoder=decoder,
                tower=tower,
                patches_per_frame=layouts[i].patches,
                scorer_flops=scoring,
            )
        )
    return tuple(found)


def _lengths(call: dict[str, Any]) -> list[int]:
    """Tokens of every row of a prompt, padding not counted."""
    ids, mask = call["input_ids"], call.get("attention_mask")
    lengths: list[int] = [ids.shape[1]] * len(ids) if mask is None else (mask != 0).sum(1).tolist()
    return lengths


def _rows(ids: Tensor, token_id: int, layouts: Sequence[VideoLayout]) -> list[int]:
    """The row of ids [B, L] in which every video begins."""
    reached = (ids == token_id).sum(1).cumsum(0).tolist()
    rows, start = [], 0
    for layout in layouts:
        rows.append(next(row for row, total in enumerate(reached) if total > start))
        start += layout.length
    return rows


def _measured(kind: Any, model: Any) -> Any:
    """The measures of a part of the model; None if its configuration does not tell them."""
    try:
        return kind.of(model)
    except ConfigError:
        return None
