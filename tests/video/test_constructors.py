"""What the parts of `vtoken.video` and the counts of a prompt refuse when they are given it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm

import vtoken
from vtoken.accounting.prefill import Decoder, kv_cache_bytes
from vtoken.video import CLIPScorer, Clue, CoTDecoupler, LVLMScorer, PrecomputedScorer, frame_question

LLAMA = Decoder(layers=2, width=8, mlp_width=16, kv_width=8)
WRONG: dict[str, Callable[[], Any]] = {
    "decoupler": lambda: CoTDecoupler(3),  # type: ignore[arg-type]
    "nan": lambda: PrecomputedScorer([float("nan")]),
    "negative": lambda: PrecomputedScorer([0.5, -1.0]),
    "text": lambda: PrecomputedScorer("ab"),  # type: ignore[arg-type]
    "number": lambda: PrecomputedScorer(3),  # type: ignore[arg-type]
    "vit": lambda: CLIPScorer(timm.create_model("test_vit"), len, len),  # type: ignore[arg-type]
    "lvlm": lambda: LVLMScorer(timm.create_model("test_vit"), 3),
    "kind": lambda: frame_question(Clue("x", (), "a")),  # type: ignore[arg-type]
    "no items": lambda: Clue("objects", (), "a"),
    "one text": lambda: Clue("objects", "cat", "a"),  # type: ignore[arg-type]
    "no clue": lambda: frame_question("a cat"),  # type: ignore[arg-type]
    "bytes": lambda: kv_cache_bytes(LLAMA, 3, 0),
    "tokens": lambda: kv_cache_bytes(LLAMA, 2.5),  # type: ignore[arg-type]
    "plan": lambda: vtoken.plan(timm.create_model("test_vit"), vtoken.VTCCLS(num_tokens=3)),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_is_refused_when_it_is_given(name: str) -> None:
    with pytest.raises(vtoken.VTokenError):
        WRONG[name]()
