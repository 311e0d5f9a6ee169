"""Pruned prompts under peft's wrapper and accelerate's offloading hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtoken

pytest.importorskip("transformers")

from tests.hosts.llavas import build, images, plain_scores, plain_top, prompt

CONFIG = vtoken.VTCCLS(num_tokens=6)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}


@torch.no_grad()
def test_lora_through_peft() -> None:
    """The wrapper is refused with the name of what is inside; scores are those of the adapted projections."""
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    stock, wrapped = build("llava"), peft.get_peft_model(build("llava"), options).eval()
    with pytest.raises(vtoken.UnsupportedModelError, match=r"use model\.base_model\.model"):
        vtoken.apply(wrapped, CONFIG)
    inner = wrapped.base_model.model
    given = prompt([1, 5, -36, 7], [2, -36, 6, 8]) | {"pixel_values": images(2)}
    adapted, plain = (plain_scores(m, images(2), 2, 2) for m in (inner, stock))
    vtoken.apply(inner, CONFIG)
    with vtoken.tracing(wrapped) as record:
        logits = wrapped(**given).logits
    assert record.prompt is not None
    kept = [k.tolist() for k in record.prompt.kept]
    assert kept == [plain_top(row, 6) for row in adapted] != [plain_top(row, 6) for row in plain]
    assert logits.shape[1] == 9
    assert torch.equal(wrapped.generate(**given, **GREEDY)[:, -3], logits[:, -1].argmax(-1))
    vtoken.remove(wrapped)
    assert wrapped(**given).logits.shape[1] == 39


@pytest.mark.parametrize("hooks", ["first", "last"])
@torch.no_grad()
def test_offloaded_weights(hooks: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, given = build("llava"), prompt([1, 5, -36, 7], [2, -36, 6, 8]) | {"pixel_values": images(2)}
    vtoken.apply(model, CONFIG)
    logits, ids = model(**given).logits, model.generate(**given, **GREEDY)
    if hooks == "first":
        vtoken.remove(model)
        vtoken.apply(accelerate.cpu_offload(model, execution_device="cpu"), CONFIG)
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(**given).logits, logits)
    assert torch.equal(model.generate(**given, **GREEDY), ids)
