"""Calls that enter a patched model another way: its inner model, embeddings, features that are ready, original ids."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

import vtoken

transformers = pytest.importorskip("transformers")

from tests.helpers import assert_close  # noqa: E402
from tests.hosts.llavas import IMAGE, build, images, prompt, shown  # noqa: E402
from vtoken.core.patch import is_patched  # noqa: E402
from vtoken.errors import VTokenWarning  # noqa: E402

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


@pytest.mark.parametrize("kind", ["llava", "vip", "video"])
def test_the_inner_model_refuses_images(kind: str) -> None:
    model, given, pixels = build(kind), prompt([1, -36, 5]), images(1)
    inner = type(model.model)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    call = given | shown(model, pixels)
    for run in (model.model, model.base_model):
        with pytest.raises(vtoken.InputError, match="base_model"):
            run(**call)
    with pytest.raises(vtoken.InputError, match="base_model"):
        model.model(given["input_ids"], pixels)
    assert model(**call).logits.shape[1] == 8
    assert model.model(input_ids=torch.tensor([[1, 5, 6]])).last_hidden_state.shape[1] == 3
    assert model.model.get_image_features(pixels).pooler_output[0].shape[0] == 36
    assert model.get_image_features(pixels).pooler_output[0].shape[0] == 36
    vtoken.remove(model)
    assert type(model.model) is inner
    assert not any(is_patched(m) for m in model.modules())
    assert model.model(**call).last_hidden_state.shape[1] == 38


@pytest.mark.parametrize("kind", ["llava", "vip", "llava_siglip"])
def test_embeddings_are_pruned_as_ids_are(kind: str) -> None:
    model, pixels = build(kind), images(3)
    given = prompt([1, -36, 5, -36, 7], [1, 6, -36], pad="left")
    embeds, mask = model.get_input_embeddings()(given["input_ids"]).detach(), given["attention_mask"]
    labels = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)
    stock = model.generate(inputs_embeds=embeds, attention_mask=mask, **shown(model, pixels), **GREEDY)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    by_ids = model(**given, labels=labels, **shown(model, pixels))
    by_embeds = model(inputs_embeds=embeds, attention_mask=mask, labels=labels, **shown(model, pixels))
    kept = by_ids.logits.shape[1]
    assert by_embeds.logits.shape[1] == kept == 3 + 12
    with vtoken.tracing(model) as record:
        model(inputs_embeds=embeds, attention_mask=mask, **shown(model, pixels))
    assert record.prompt is not None
    seen = (record.prompt.index >= 0).unsqueeze(-1)
    assert_close("logits", by_ids.logits * seen, by_embeds.logits * seen, 1e-5)
    assert_close("loss", by_ids.loss, by_embeds.loss, 1e-5)
    expected = model.generate(**given, **shown(model, pixels), **GREEDY)
    for options in (GREEDY, {"do_sample": False, "max_length": given["input_ids"].shape[1] + 5}):
        new = model.generate(inputs_embeds=embeds, attention_mask=mask, **shown(model, pixels), **options)
        assert torch.equal(new, expected[:, -5:]), "embeddings bring no ids to put in front"
    both = model.generate(
        given["input_ids"], inputs_embeds=embeds, attention_mask=mask, **shown(model, pixels), **GREEDY
    )
    assert torch.equal(both, expected)
    vtoken.configure(model, num_tokens=36)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, attention_mask=mask, **shown(model, pixels), **GREEDY), stock
    )


def test_tuned_prompts_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model, pixels = build("llava"), images(1)
    given = prompt([1, 5, -36, 7, 8])
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    tuned = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=2, token_dim=32, num_attention_heads=2
        ),
    )
    seen: list[int] = []
    model.model.language_model.register_forward_hook(lambda m, i, o: seen.append(o[0].shape[1]))
    tuned(**given, pixel_values=pixels)
    assert seen == [4 + 4 + 6]
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        with pytest.raises(vtoken.UnsupportedModelError, match="prepare_inputs_for_generation was replaced"):
            tuned.generate(**given, pixel_values=pixels, max_new_tokens=2)
        return
    tuned.generate(**given, pixel_values=pixels, max_new_tokens=2)
    assert seen[1] == 4 + 4 + 6


def test_features_that_are_ready_are_warned_of() -> None:
    model, given, pixels = build("llava"), prompt([1, -36, 5]), images(1)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release takes no features")
    ready = {"image": model.get_image_features(pixels)}
    stock = model(**given, mm_encoder_outputs=dict(ready)).logits
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with pytest.warns(VTokenWarning, match="mm_encoder_outputs"):
        assert torch.equal(model(**given, mm_encoder_outputs=dict(ready)).logits, stock)
    with pytest.warns(VTokenWarning, match="mm_encoder_outputs"):
        model.generate(**given, mm_encoder_outputs=dict(ready), **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VTokenWarning)
        model(**given, pixel_values=pixels)
        model.generate(**given, pixel_values=pixels, **GREEDY, num_beams=2)
        model.generate(input_ids=torch.tensor([[1, 2]]), **GREEDY)


def test_prompts_of_the_original_code_are_refused_by_name() -> None:
    model, pixels = build("llava"), images(1)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    ids = torch.tensor([[1, -200, 5, 6]])
    with pytest.raises(vtoken.InputError, match=r"-200.*AutoProcessor"):
        model(input_ids=ids, pixel_values=pixels)
    with pytest.raises(vtoken.InputError, match=r"-200.*AutoProcessor"):
        model.generate(ids, pixel_values=pixels, **GREEDY)


@pytest.mark.parametrize("wrong", [{"positions": "Compact"}, {"padding_side": "LEFT"}, {"positions": None}], ids=str)
def test_names_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(vtoken.InputError, match=next(iter(wrong))):
        vtoken.shrink_inputs(torch.tensor([[1, 9, 9, 9]]), [torch.tensor([2])], [3], token_id=9, **wrong)
    with pytest.raises(vtoken.InputError, match="input_ids"):
        vtoken.shrink_inputs([[1, 9]], [torch.tensor([0])], [1], token_id=9)  # type: ignore[arg-type]
