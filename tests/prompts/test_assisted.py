"""Assisted decoding of shortened prompts: another model, or the prompt itself, guesses; the answer stays the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken

transformers = pytest.importorskip("transformers")

from tests.hosts import llavas  # noqa: E402
from tests.prompts import qwens, test_internvl, tiled  # noqa: E402

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [59, 58]}
KINDS = ["llava", "internvl", "qwen2_5", "qwen3", "glm4v", "smolvlm", "gemma3", "llava_pixtral"]


def case(kind: str) -> tuple[Any, dict[str, Any]]:
    """A model and one row of two images."""
    if kind == "llava":
        return llavas.build(kind), llavas.prompt([1, 5, -36, 7, -36, 8]) | {"pixel_values": llavas.images(2)}
    if kind == "internvl":
        given = llavas.prompt([1, -27, 5, -9, 7, 8]) | {"pixel_values": test_internvl.call()["pixel_values"][:4]}
        return test_internvl.build(), given
    if kind in tiled.KINDS:
        return tiled.build(kind), tiled.alone(kind, tiled.call(kind), 0)
    return qwens.build(kind), qwens.row_of(qwens.call(), 0)


@pytest.mark.skipif(not tiled.takes_outputs(), reason="this release takes no ready outputs")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_answer_is_that_without_help(kind: str) -> None:
    model, given = case(kind)
    plain, length, seen = copy.deepcopy(model), given["input_ids"].shape[1], list[int]()
    vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    helpers = {
        "prompt_lookup_num_tokens": 3,
        "assistant_model": plain,  # guesses from the short prompt
        "patched": vtoken.apply(copy.deepcopy(plain), vtoken.DivPrune(num_tokens=3)),
    }

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        assert torch.equal(ids[:, :length], given["input_ids"])
        return scores

    alone = model.generate(**given, **GREEDY)
    for name, helper in helpers.items():
        more = {"assistant_model" if name == "patched" else name: helper}
        assert torch.equal(model.generate(**given, **GREEDY, **more, logits_processor=[watch]), alone), name
    assert min(seen) >= length
    assert max(seen) > length


@torch.no_grad()
def test_features_as_embeddings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtoken.prompts import family

    model, given = case("llava")
    vtoken.apply(model, vtoken.DivPrune(num_tokens=3))
    monkeypatch.setattr(family, "takes_outputs", lambda _: False)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
        with pytest.raises(vtoken.InputError, match=r"assisted decoding .*5\.18"):
            model.generate(**given, **GREEDY, **more)
