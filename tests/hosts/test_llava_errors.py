"""What VTC-CLS refuses, and that nothing has changed then (docs/methods/vtc_cls.md 11 and 16)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import TEXT, build, images, prompt  # noqa: E402

CONFIG = vtoken.VTCCLS(num_tokens=6)


def _refused() -> dict[str, Any]:
    t = transformers
    text = t.LlamaConfig(**TEXT)
    dino = t.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    smol = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    idefics2 = t.Idefics2Config(
        vision_config=smol | {"image_size": 32, "patch_size": 8}, text_config=t.MistralConfig(**TEXT)
    )
    return {
        "its image tower is a Dinov2Model": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=dino, text_config=text)
        ),
        "its resampler mixes image tokens": lambda: t.Idefics2ForConditionalGeneration(idefics2),
        "does not know its prompts": lambda: t.LlamaForCausalLM(text),
        "LlavaModel": lambda: build("llava").model,
        "CLIPVisionModel": lambda: build("llava").model.vision_tower,
    }


@pytest.mark.parametrize("reason", list(_refused()))
def test_other_models_are_refused_by_name(reason: str) -> None:
    with torch.device("meta"):
        model = _refused()[reason]()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=reason) as error:
        vtoken.apply(model, CONFIG)
    assert isinstance(error.value, vtoken.UnsupportedModelError)
    for name in ("LlavaForConditionalGeneration", "VideoLlava", "The model was left as it was"):
        assert name in str(error.value)
    assert [type(m) for m in model.modules()] == classes


def test_models_of_other_libraries_and_wrappers() -> None:
    import timm

    with pytest.raises(vtoken.UnsupportedModelError, match="no multimodal model"):
        vtoken.apply(timm.create_model("test_vit"), CONFIG)
    model = build("llava")
    with pytest.raises(vtoken.UnsupportedModelError, match=r"use model\.inner"):
        vtoken.apply(_Holder(model), CONFIG)
    with pytest.raises(vtoken.VTokenError, match=r"model\.module"):
        vtoken.apply(torch.nn.DataParallel(model), CONFIG)
    model.generate = model.generate
    with pytest.raises(vtoken.UnsupportedModelError, match="replaced on the instance"):
        vtoken.apply(model, CONFIG)
    assert not vtoken.is_applied(model)


class _Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [("llava", {"start_layer": 3}, "0 to 2"), ("llava", {"start_layer": 9}, "0 to 2"),
     ("llava", {"start_layer": -5}, "0 to 2"), ("llava_siglip", {"scorer": "cls"}, "no class token"),
     ("onevision", {"scorer": "cls"}, "no class token")],
)  # fmt: skip
def test_settings_that_do_not_fit_the_tower(kind: str, options: dict[str, Any], message: str) -> None:
    model = build(kind)
    with pytest.raises(vtoken.ConfigError, match=message):
        vtoken.apply(model, CONFIG.replace(**options))
    assert not vtoken.is_applied(model)
    vtoken.apply(model, CONFIG)
    with pytest.raises(vtoken.ConfigError, match=message):
        vtoken.configure(model, **options)
    assert vtoken.config_of(model) == CONFIG


def test_the_projector_may_not_read_the_embeddings() -> None:
    with pytest.raises(vtoken.ConfigError, match="embeddings"):
        vtoken.apply(build("llava", vision_feature_layer=0), CONFIG)


def test_applying_twice() -> None:
    model = build("llava")
    vtoken.apply(model, CONFIG)
    with pytest.raises(vtoken.AlreadyAppliedError, match="vtc_cls"):
        vtoken.apply(model, CONFIG)
    with pytest.raises(vtoken.ConfigError, match="two methods"):
        vtoken.apply(build("llava"), [CONFIG, CONFIG.replace(num_tokens=3)])
    vtoken.apply(model, CONFIG.replace(num_tokens=3), replace=True)
    assert vtoken.config_of(model) == CONFIG.replace(num_tokens=3)
    vtoken.remove(model)
    with pytest.raises(vtoken.VTokenError, match="nothing to remove"):
        vtoken.remove(model)


@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_placeholder_counts_that_fit_nothing(verb: str) -> None:
    model = build("llava")
    vtoken.apply(model, CONFIG)
    call = model.forward if verb == "forward" else model.generate
    for row in ([1, -35, 5], [1, -37, 5], [1, -7, 5], [1, -12, 5]):
        with pytest.raises(ValueError, match=rf"{-row[1]} image placeholders.* 36 features, 6 of them kept"):
            call(**prompt(row), pixel_values=images(1))
    with pytest.raises(vtoken.ShapeError, match="disagree"):
        call(**prompt([1, -36, 5]), pixel_values=images(2))


def test_the_library_speaks_for_itself() -> None:
    """Images without placeholders, and calls that are wrong with or without pruning."""
    model, text = build("llava"), prompt([1, 5, 6])
    with pytest.raises(ValueError) as stock:  # noqa: PT011
        model(**text, pixel_values=images(1))
    vtoken.apply(model, CONFIG)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        model(**text, pixel_values=images(1))
    assert str(ours.value) == str(stock.value)
    with pytest.raises(ValueError, match="exactly one of"):
        model(pixel_values=images(1))
    vtoken.remove(model)
    alone = prompt([1, -36, 5])  # placeholders without an image
    verbs = (lambda: model(**alone).logits, lambda: model.generate(**alone, do_sample=False, max_new_tokens=2))
    before = [_outcome(verb) for verb in verbs]
    vtoken.apply(model, CONFIG)
    for verb, stock_outcome in zip(verbs, before, strict=True):
        found = _outcome(verb)
        assert torch.equal(found, stock_outcome) if isinstance(found, Tensor) else found == stock_outcome


@torch.no_grad()
def _outcome(call: Any) -> Any:
    try:
        return call()
    except ValueError as error:
        return str(error)


def test_bad_masks_and_labels_are_refused_before_the_tower_runs() -> None:
    model, given = build("llava"), prompt([1, -36, 5]) | {"pixel_values": images(1)}
    vtoken.apply(model, CONFIG)
    ran: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match="more dimensions"):
        model(**given, attention_mask=torch.ones(1, 1, 38, 38))
    with pytest.raises(vtoken.ShapeError, match="labels"):
        model(**given, labels=torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(vtoken.ShapeError, match="position_ids"):
        model(**given, position_ids=torch.zeros(3, 1, 38, dtype=torch.long))
    assert not ran
    with pytest.raises(vtoken.InputError, match="logits_to_keep"):
        model(**given, logits_to_keep=torch.tensor([3]))
    assert model(**given, logits_to_keep=2).logits.shape[1] == 2


def test_broken_scores_do_not_break_the_choice() -> None:
    model, given = build("llava"), prompt([1, -36, 5]) | {"pixel_values": images(1)}
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[2].self_attn.k_proj.weight.fill_(float("nan"))
        vtoken.apply(model, CONFIG)
        _, trace = vtoken.trace(model, **given)
    assert trace.prompt.kept[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_videos_run_unpruned_with_one_warning() -> None:
    model = build("video")
    frames = torch.randn(1, 2, 3, 24, 24)
    given = {"input_ids": torch.tensor([[1] + [58] * 2 * 37 + [5]]), "pixel_values_videos": frames}
    with torch.no_grad():
        stock = model(**given).logits
        ids = model.generate(**given, max_new_tokens=2, do_sample=False)
        vtoken.apply(model, CONFIG)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                assert torch.equal(model(**given).logits, stock)
        assert [str(w.message) for w in caught if "video" in str(w.message)] == [
            "vtc_cls does not prune video tokens: this call runs unpruned, its images too"
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(model.generate(**given, max_new_tokens=2, do_sample=False), ids)
            model(**given)
        ours = [w.filename for w in caught if "unpruned" in str(w.message)]
        assert len(ours) == 2, "one for generate, one for the call"
        assert ours[1] == __file__


def test_text_only_calls_reach_the_library_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtoken.prompts import entry as llava_entry

    model, given = build("llava"), prompt([1, 5, 6])
    with torch.no_grad():
        stock = model(**given).logits
        vtoken.apply(model, CONFIG)

        def never(*_: Any, **__: Any) -> Any:
            raise AssertionError("a text-only call was looked at")

        for name in ("prepare", "by_name", "eagerly"):
            monkeypatch.setattr(llava_entry, name, never)
        assert torch.equal(model(**given).logits, stock)
        assert torch.equal(model(given["input_ids"]).logits, stock)


def test_nothing_to_trace_in_text_only_calls() -> None:
    model = build("llava")
    vtoken.apply(model, CONFIG)
    with pytest.raises(vtoken.VTokenError, match="nothing was recorded"):
        vtoken.trace(model, **prompt([1, 5, 6]))


def test_gapped_positions_come_with_a_mask() -> None:
    """Without one the library takes every jump for the start of another sequence (docs/methods/vtc_cls.md 16)."""
    model, given = build("llava"), prompt([1, -36, 5, 6]) | {"pixel_values": images(1)}
    vtoken.apply(model, CONFIG.replace(positions="original"))
    seen: list[dict[str, Any]] = []
    model.model.language_model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw), with_kwargs=True)
    with torch.no_grad():
        model(**given)
    mask: Tensor = seen[0]["attention_mask"]
    assert mask.tolist() == [[1] * 9]
    places = seen[0]["position_ids"][0]
    assert places[0] == 0
    assert places[-2:].tolist() == [37, 38]


def test_get_image_features_keeps_its_signature() -> None:
    """generate reads it to find out what to pass (docs/methods/vtc_cls.md 16)."""
    import inspect

    model = build("llava")
    before = inspect.signature(model.model.get_image_features), inspect.signature(model.forward)
    vtoken.apply(model, CONFIG)
    assert (inspect.signature(model.model.get_image_features), inspect.signature(model.forward)) == before
    with torch.no_grad():
        full = model.model.get_image_features(pixel_values=images(1)).pooler_output
    assert len(full[0]) == 36, "features are pruned on their way to the prompt, not where they are made"


def test_missing_pad_token() -> None:
    model = build("llava")
    model.config.pad_token_id = model.config.text_config.pad_token_id = None
    vtoken.apply(model, CONFIG)
    given = prompt([1, -36, -36, 7], [1, -36, *[5] * 37])
    with torch.no_grad():
        _, trace = vtoken.trace(model, **given, pixel_values=images(3))
    assert trace.prompt.input_ids[0, -1] == 0
