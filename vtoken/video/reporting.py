"""Reports of the videos of one call (docs/methods/quota.md 10)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.accounting.prefill import Decoder
from vtoken.accounting.vision import Tower
from vtoken.errors import ConfigError
from vtoken.methods.quota import FrameBudget, default_tokens
from vtoken.prompts.engine import Prepared
from vtoken.video.report import QuotaReport


def reports(
    model: Any, token_id: int, given: dict[str, Any], prepared: Prepared, scoring: int | None
) -> tuple[QuotaReport, ...]:  # fmt: skip
    """One report per video, in prompt order.

    Args:
        token_id: of a video placeholder.
        given: the call before its prompt was rebuilt.
        scoring: FLOPs of the scorer, if known.
    """
    plan = prepared.plan
    before, after = _lengths(given), _lengths(prepared.call | {"input_ids": prepared.ids})
    decoder, tower = _measured(Decoder, model), _measured(Tower, model)
    found, passed = [], 0
    reached = (given["input_ids"] == token_id).sum(1).cumsum(0).tolist()
    for i in plan.of_kind("video"):
        visual, method = plan.visuals[i], plan.methods[i]
        assert isinstance(method, FrameBudget)
        spent = method.spent(visual, plan.clues[i])
        row = next(row for row, total in enumerate(reached) if total > passed)
        passed += visual.length
        found.append(
            QuotaReport(
                scores=spent.scores,
                tokens_per_frame=spent.taken,
                rows_per_frame=tuple(map(len, spent.lines)),
                budget_requested=spent.budget,
                default_tokens=default_tokens(visual),
                separator_tokens=spent.separators,
                sequence_length_before=before[row],
                sequence_length_after=after[row],
                decoder=decoder,
                tower=tower,
                patches_per_frame=visual.patches,
                scorer_flops=scoring,
            )
        )
    return tuple(found)


def _lengths(call: dict[str, Any]) -> list[int]:
    """Tokens of every row of a prompt, padding not counted."""
    ids, mask = call["input_ids"], call.get("attention_mask")
    assert isinstance(ids, Tensor)
    lengths: list[int] = [ids.shape[1]] * len(ids) if mask is None else (mask != 0).sum(1).tolist()
    return lengths


def _measured(kind: Any, model: Any) -> Any:
    """The measures of a part of the model; None if its configuration does not tell them."""
    try:
        return kind.of(model)
    except ConfigError:
        return None
