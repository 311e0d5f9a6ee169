"""Which hidden states of an image tower the model around it reads: 0 are the embeddings, i + 1 is what block i made."""

from __future__ import annotations

from typing import Any

#: What the argument of a call, and the setting, is called over the versions.
LAYER_NAMES = ("vision_feature_layer", "vision_feature_layers")
#: What says, "default" or "full", whether the first row of theirs goes.
STRATEGY = "vision_feature_select_strategy"


def states_read(config: Any, given: dict[str, Any] | None = None) -> list[int] | None:
    """Their numbers, as a call or else the configuration of the model says; None if neither does."""
    named = [(given or {}).get(n) for n in LAYER_NAMES] + [getattr(config, n, None) for n in LAYER_NAMES]
    value = next((v for v in named if v is not None), None)
    return [value] if isinstance(value, int) else value if value is None else list(value)


def last_read(config: Any, depth: int, given: dict[str, Any] | None = None) -> int:
    """The block of `depth` behind which the last of them lies, -1 for the embeddings; if nothing is said, the last."""
    return max(state % (depth + 1) for state in states_read(config, given) or [depth]) - 1


def drops_first(model: Any, given: dict[str, Any] | None = None) -> bool:
    """Whether the first row that leaves the tower is thrown away: the class token, if there is one.

    ViP-LLaVA, which has no such setting, always does.
    """
    return bool(((given or {}).get(STRATEGY) or getattr(model.config, STRATEGY, "default")) == "default")
