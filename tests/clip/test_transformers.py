"""Attentive-mask training of transformers' CLIPs, called in their own words, by a plain loop."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

import vtoken
from tests.clip.hf_models import DEPTH, EMBED, MODELS, TEXT, VISION, WIDTH, dual, hf_batch, hf_clip, hf_wrap
from tests.clip.models import gradients
from tests.helpers import assert_close, assert_same

OWN_LOSS = ["clip", "siglip"]


def layers_of(tower: Any) -> Any:
    inner = tower if hasattr(tower, "layers") else tower.encoder
    return inner.layers if hasattr(inner, "layers") else inner.layer


def slow_pooled(tower: Any, x: Tensor, kept: Tensor) -> Tensor:
    """Pooled features of a tower on some patches of each image, one image at a time, tokens taken out by hand."""
    out = []
    prefix = 0 if isinstance(tower, hf.SiglipVisionModel) else 1
    for image, patches in zip(x, kept.tolist(), strict=True):
        embedded = tower.embeddings(image[None])[0]
        rows = [embedded[i] for i in range(prefix)] + [embedded[prefix + p] for p in patches]
        tokens = torch.stack(rows)[None]
        if hasattr(tower, "pre_layrnorm"):
            tokens = tower.pre_layrnorm(tokens)
        for layer in layers_of(tower):
            tokens = layer(tokens, None) if hasattr(layer, "self_attn") else layer(tokens)
        if isinstance(tower, hf.SiglipVisionModel):
            out.append(tower.head(tower.post_layernorm(tokens))[0])
        elif isinstance(tower, hf.ViTModel):
            out.append(tower.pooler(tower.layernorm(tokens))[0])
        elif isinstance(tower, hf.Dinov2Model):
            out.append(tower.layernorm(tokens)[0, 0])
        else:
            out.append(tower.post_layernorm(tokens[:, 0])[0])
    return torch.stack(out)


def slow_loss(model: Any, given: dict[str, Any], views: list[Tensor], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Image features [B, V, E] and the loss of masked views by the formulas of the two papers."""
    text = model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).pooler_output
    t = F.normalize(text, dim=-1)
    features, losses = [], []
    for x, rows in zip(views, kept, strict=True):
        pooled = slow_pooled(model.vision_model, x, rows)
        u = F.normalize(model.visual_projection(pooled) if hasattr(model, "visual_projection") else pooled, dim=-1)
        logits = model.logit_scale.exp() * u @ t.T
        if hasattr(model, "logit_bias"):  # SigLIP: every pair by itself, -1 unless image and text belong together
            logits = logits + model.logit_bias
            signs = 2 * torch.eye(len(x)) - 1
            losses.append(-F.logsigmoid(signs * logits).sum() / len(x))
        else:
            labels = torch.arange(len(x))
            losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
        features.append(u)
    return torch.stack(features, 1), torch.stack(losses).mean()


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_masked_is_bit_equal(name: str) -> None:
    """Whatever the output holds, the loss included; in eval mode at any ratio."""
    model, given = hf_clip(name).train(), hf_batch()
    wrapper = vtoken.AttentiveMaskCLIP(model, keep_ratio=1.0, block=1)
    assert isinstance(wrapper, vtoken.AttentiveMaskCLIP)
    expected, found = model(**given), wrapper(**given)
    assert type(found) is type(expected)
    assert_same("output", expected, found)
    assert_same("a list of one", expected, wrapper(**given | {"pixel_values": [given["pixel_values"]]}))
    assert_same("in its order", expected, wrapper(given["input_ids"], given["pixel_values"], return_loss=True))
    wrapper.keep_ratio = 0.5
    masked = wrapper(**given)
    assert not torch.equal(expected.image_embeds, masked.image_embeds)
    assert torch.equal(expected.text_embeds, masked.text_embeds)
    assert_same("eval", model.eval()(**given), wrapper.eval()(**given))
    assert_same("tuples", model(**given, return_dict=False), wrapper(**given, return_dict=False))


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "dual_dinov2"])
def test_the_student_sees_the_kept_patches(name: str) -> None:
    """Features, the model's own loss and every gradient are those of tokens taken out by hand."""
    wrapper, given = hf_wrap(name, keep_ratio=0.3), hf_batch()
    kept = wrapper.select(wrapper.score(given["pixel_values"]))
    assert kept.shape == (4, 20)
    found = wrapper(**given)
    found.loss.backward()
    grads = gradients(wrapper.model)
    wrapper.model.zero_grad()
    features, loss = slow_loss(wrapper.model, given, [given["pixel_values"]], [kept])
    loss.backward()
    assert_close("features", features[:, 0], found.image_embeds, 1e-5)
    assert_close("loss", loss, found.loss, 1e-6)
    expected = gradients(wrapper.model)
    assert expected.keys() == grads.keys()
    for key, grad in expected.items():
        if float(grad.abs().max()) > 1e-6:
            assert_close(key, grad, grads[key], 1e-4)
    others = torch.stack([torch.tensor(sorted(set(range(64)) - set(row.tolist()))) for row in kept])
    wrong = slow_loss(wrapper.model, given, [given["pixel_values"]], [others])[0][:, 0]
    assert float((wrong - found.image_embeds).detach().abs().max()) > 0.05


def test_positions_of_patches_that_nobody_kept_have_no_gradient() -> None:
    wrapper, given = hf_wrap(keep_ratio=0.1), hf_batch()
    kept = wrapper.select(wrapper.score(given["pixel_values"]))
    wrapper(**given).loss.backward()
    grad = wrapper.model.vision_model.embeddings.position_embedding.weight.grad
    seen = {0} | {int(p) + 1 for p in kept.flatten()}
    assert len(seen) < 40
    assert {i for i in range(65) if bool((grad[i] != 0).any())} == seen


@pytest.mark.parametrize("layers", ["all", "last", [0, 2]])
def test_scores_are_the_class_rows_of_attention_maps(layers: Any) -> None:
    """transformers' own maps; the student has moved on, the teacher counts."""
    wrapper, given = hf_wrap(layers=layers), hf_batch()
    teacher = copy.deepcopy(wrapper.model.vision_model).eval()
    with torch.no_grad():
        for p in wrapper.model.parameters():
            p.mul_(1.1)
    teacher.set_attn_implementation("eager")
    maps = teacher(given["pixel_values"], output_attentions=True).attentions
    chosen = {"all": range(DEPTH), "last": [DEPTH - 1]}.get(str(layers), layers)
    expected = torch.stack([maps[i][:, :, 0, 1:].mean(1) for i in chosen]).mean(0)
    assert_close("scores", expected.view(4, 8, 8), wrapper.score(given["pixel_values"]), 1e-5)


def test_siglips_scores_are_its_pools_attention() -> None:
    """There is no class token: the query of the pool says what matters."""
    wrapper, x = hf_wrap("siglip"), hf_batch()["pixel_values"]
    tower = wrapper.model.vision_model
    rows = tower(x).last_hidden_state
    _, expected = tower.head.attention(tower.head.probe.expand(4, -1, -1), rows, rows, need_weights=True)
    assert_close("scores", expected.view(4, 8, 8), wrapper.score(x), 1e-5)
    assert wrapper.layers == (DEPTH,)
    for name in ("all", "last"):
        wrapper.layers = name
    for bad in ([0], [DEPTH]):
        with pytest.raises(vtoken.ConfigError, match="the query of its attention pool says what matters"):
            wrapper.layers = bad


@pytest.mark.parametrize("name", OWN_LOSS)
def test_views_and_heads(name: str) -> None:
    """The loss is the mean over views of the model's own, plus the losses of the heads with the settings' weights."""
    wrapper, given = hf_wrap(name, simclr_weight=0.5, byol_weight=2.0, head_norm="layer"), hf_batch()
    x = given["pixel_values"]
    views = [x, x.roll(3, 2)]
    kept = wrapper.select(wrapper.score(x))
    found = wrapper(**given | {"pixel_values": views})
    features, loss = slow_loss(wrapper.model, given, views, [kept, kept])
    assert_close("features", features, found.image_embeds, 1e-5)
    assert found.logits_per_image.shape == found.logits_per_text.shape == (4, 2, 4)
    for v in (0, 1):
        assert_close(f"logits of view {v}", found.logits_per_image[:, v], found.logits_per_text[:, v].T, 1e-6)
    assert found.vision_model_output is None
    pooled = [slow_pooled(wrapper.model.vision_model, view, kept) for view in views]
    a, b = (F.normalize(wrapper.simclr_head(p), dim=-1) for p in pooled)
    same = torch.eye(4).bool()
    simclr = torch.zeros(())
    for one, other in ((a, b), (b, a)):
        own = (one @ one.T).masked_fill(same, -torch.inf)
        simclr = simclr + F.cross_entropy(torch.cat([one @ other.T, own], 1) / 0.1, torch.arange(4)) / 2
    target = wrapper.teacher.byol_projector(wrapper.teacher.vision_model(x).pooler_output)
    predicted = [wrapper.byol_predictor(wrapper.byol_projector(p)) for p in pooled]
    byol = sum((2 - 2 * F.cosine_similarity(p, target)).mean() for p in predicted)
    assert_close("loss", loss + 0.5 * simclr + 2.0 * byol, found.loss, 1e-5)
    found.loss.backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)
    with pytest.raises(vtoken.InputError, match="call with return_loss=True"):
        wrapper(**given | {"pixel_values": views, "return_loss": None})


def _parts(out: Any) -> list[Tensor]:
    """The tensors of an output in their order, whatever holds them."""
    held = out.values() if isinstance(out, dict) else out
    return [x for each in held if each is not None for x in ([each] if isinstance(each, Tensor) else _parts(each))]


@pytest.mark.parametrize(
    ("name", "views", "where"),
    [
        ("clip", 2, "call"),  # by its configuration transformers' own CLIPModel cannot
        *[(n, v, w) for n, v in (("siglip", 1), ("dual", 2)) for w in ("call", "configuration", "all configurations")],
    ],
)
def test_tuples_hold_what_is_otherwise_named(name: str, views: int, where: str) -> None:
    """Several views, heads and models that hand `return_dict` on to their towers."""
    heads = {"byol_weight": 1.0, "head_norm": "layer"} | ({"simclr_weight": 1.0} if views == 2 else {})
    wrapper, given = hf_wrap(name, **heads), hf_batch()
    given["pixel_values"] = [given["pixel_values"]] * views if views > 1 else given["pixel_values"]
    expected = wrapper(**given)
    assert not isinstance(expected, tuple)
    if where == "call":
        given["return_dict"] = False
    else:
        wrapper.model.config.return_dict = False
        for tower in (wrapper.model.vision_model, wrapper.model.text_model, wrapper.teacher.vision_model):
            tower.config.return_dict = where != "all configurations"
    found = wrapper(**given)
    assert isinstance(found, tuple)
    assert_same("parts", _parts(expected), _parts(found))
    assert not isinstance(wrapper(**given | {"return_dict": True}), tuple)


def test_boxes_and_a_teacher_image() -> None:
    """The student's rows come from the teacher's image by the boxes, as for open_clip's models."""
    wrapper, given = hf_wrap(), hf_batch()
    x = given["pixel_values"]
    boxes = {"view_boxes": torch.tensor([[[0, 0, 32, 32]]] * 4), "teacher_boxes": torch.tensor([[0, 0, 32, 32]] * 4)}
    other = wrapper.select(wrapper.score(-x))
    found = wrapper(**given, teacher_image=-x, **boxes)
    assert_close("features", slow_loss(wrapper.model, given, [x], [other])[0][:, 0], found.image_embeds, 1e-5)
    with pytest.raises(vtoken.ConfigError, match="view_boxes without teacher_boxes"):
        wrapper(**given, view_boxes=boxes["view_boxes"])


def test_images_of_another_size() -> None:
    """As the model: refused unless positions are asked for; a smaller teacher gets them in any case."""
    wrapper, given = hf_wrap(), hf_batch()
    large = F.interpolate(given["pixel_values"], size=(48, 40))
    with pytest.raises(vtoken.ShapeError, match=r"views are \(48, 40\) pixels, the image tower takes \(32, 32\)"):
        wrapper(**given | {"pixel_values": large})
    wrapper.keep_ratio = 1.0
    sized = given | {"pixel_values": large, "interpolate_pos_encoding": True}
    assert_same("all patches", wrapper.model(**sized), wrapper(**sized))
    wrapper.keep_ratio = 0.5
    assert wrapper(**sized).vision_model_output.last_hidden_state.shape == (4, 61, WIDTH)
    wrapper.teacher_scale = 0.5
    assert wrapper.score(given["pixel_values"]).shape == (4, 4, 4)
    assert bool(wrapper(**given).loss.isfinite())


@pytest.mark.parametrize("name", OWN_LOSS)
@pytest.mark.parametrize("attach", [True, False])
def test_a_plain_loop_moves_the_teacher(name: str, attach: bool) -> None:
    """By the closed form, whether it is attached or follows by itself; gradients that accumulate are one step."""
    wrapper = hf_wrap(name, momentum=0.9, total_steps=8)
    optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=1e-2)
    if attach:
        wrapper.attach_ema(optimizer)
    expected = {n: p.detach().clone() for n, p in wrapper.model.named_parameters()}
    for step in range(1, 4):
        for micro in (0, 1):
            wrapper(**hf_batch(seed=2 * step + micro)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        m = wrapper.momentum_at(step)
        for n, p in wrapper.model.named_parameters():
            expected[n] = m * expected[n] + (1 - m) * p.detach()
        assert int(wrapper.ema_step) == step
    averaged = [n for n, _ in wrapper.teacher.named_parameters()]
    assert {n.partition(".")[0] for n in averaged} == set(wrapper._pair.image_parts)
    for n in averaged:
        assert_close(n, expected[n], wrapper.teacher.get_parameter(n), 1e-5)
        assert not torch.equal(expected[n], wrapper.model.get_parameter(n)), n
    average = wrapper.unwrap(ema=True).eval()
    x = hf_batch()["pixel_values"]
    assert_close("teacher", average.get_image_features(x).pooler_output, wrapper.encode_image(x, ema=True), 1e-6)
    assert not torch.equal(wrapper.encode_image(x), wrapper.encode_image(x, ema=True))


def test_texts_are_averaged_on_demand() -> None:
    wrapper = hf_wrap(ema_text=True, momentum=0.5)
    optimizer = torch.optim.SGD(wrapper.model.parameters(), 0.1)
    wrapper(**hf_batch()).loss.backward()
    optimizer.step()
    copied = wrapper.unwrap(ema=True)
    assert not torch.equal(copied.text_projection.weight, wrapper.model.text_projection.weight)
    assert torch.equal(copied.text_projection.weight, wrapper.teacher.text_projection.weight)
    assert torch.equal(copied.logit_scale, wrapper.model.logit_scale)


def test_the_text_tower_runs_once_and_hooks_are_heard() -> None:
    """Of several views, too; what hooks are given is the module of the model."""
    wrapper, given = hf_wrap(), hf_batch()
    heard: list[str] = []
    model = wrapper.model
    for name in ("text_model", "vision_model", "visual_projection", "vision_model.encoder.layers.0.self_attn"):
        part = model.get_submodule(name)
        part.register_forward_hook(lambda m, a, o, name=name, part=part: heard.append(name) if m is part else None)
    x = given["pixel_values"]
    wrapper(**given | {"pixel_values": [x, x.flip(0), x]})
    assert sorted(heard) == sorted(
        ["text_model", "vision_model", "vision_model.encoder.layers.0.self_attn"] + 3 * ["visual_projection"]
    )


def test_what_is_recorded_is_of_the_masked_images() -> None:
    wrapper, given = hf_wrap(), hf_batch()
    out = wrapper(**given, output_hidden_states=True)
    states = out.vision_model_output.hidden_states
    assert [tuple(s.shape) for s in states] == [(4, 33, WIDTH)] * (DEPTH + 1)
    assert torch.equal(states[-1], out.vision_model_output.last_hidden_state)
    assert len(out.text_model_output.hidden_states) == 2
    plain = wrapper(**given)
    assert plain.vision_model_output.hidden_states is None
    assert_same("features", plain.image_embeds, out.image_embeds)


@pytest.mark.parametrize("name", OWN_LOSS)
def test_checkpointing_gives_identical_gradients(name: str) -> None:
    found = []
    for checkpointed in (False, True):
        wrapper = hf_wrap(name)
        if checkpointed:
            wrapper.gradient_checkpointing_enable()
            assert wrapper.is_gradient_checkpointing
        wrapper(**hf_batch()).loss.backward()
        found.append(gradients(wrapper))
    assert_same("gradients", *found)


def test_autocast_and_half_precision() -> None:
    """Scores are float32, and so is the teacher."""
    wrapper, given = hf_wrap(), hf_batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = wrapper(**given)
        assert wrapper.score(given["pixel_values"]).dtype == torch.float32
    out.loss.backward()
    assert bool(out.loss.isfinite())
    wrapper.to(torch.bfloat16)
    assert wrapper.teacher.visual_projection.weight.dtype == torch.float32
    out = wrapper(**given | {"pixel_values": given["pixel_values"].bfloat16()})
    assert out.image_embeds.dtype == torch.bfloat16


def test_copies_and_settings() -> None:
    wrapper, given = hf_wrap(keep_ratio=0.25), hf_batch()
    for other in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert type(other) is type(wrapper)
        assert vtoken.config_of(other) == vtoken.config_of(wrapper)
        assert_same("output", wrapper(**given), other(**given))
    vtoken.configure(wrapper, keep_ratio=0.5, mode="random")
    assert vtoken.config_of(wrapper).mode == "random"
    wrapper.load_state_dict(hf_wrap().state_dict())
    assert wrapper.config is wrapper.model.config
    assert wrapper.step_macs() < wrapper.step_macs(keep_ratio=1.0)


def test_save_pretrained_writes_the_model_that_is_wrapped(tmp_path: Any) -> None:
    wrapper, given = hf_wrap(momentum=0.5), hf_batch()
    optimizer = torch.optim.SGD(wrapper.model.parameters(), 0.1)
    wrapper(**given).loss.backward()
    optimizer.step()
    wrapper.save_pretrained(tmp_path / "student")
    wrapper.unwrap(ema=True).save_pretrained(tmp_path / "teacher")
    for name, model in (("student", wrapper.model), ("teacher", wrapper.unwrap(ema=True))):
        again = hf.CLIPModel.from_pretrained(tmp_path / name)
        assert_same(name, model.state_dict(), again.state_dict())


def test_subclasses_are_their_base() -> None:
    class Mine(hf.CLIPModel):
        """A user's own."""

    config = hf.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=EMBED)
    assert bool(vtoken.AttentiveMaskCLIP(Mine(config), block=1).train()(**hf_batch()).loss.isfinite())


def test_a_subclass_of_the_wrapper_must_know_the_words() -> None:
    class Mine(vtoken.AttentiveMaskCLIP):
        """A user's own."""

    with pytest.raises(vtoken.UnsupportedModelError, match="AttentiveMaskTransformersCLIP to train a CLIPModel"):
        Mine(hf_clip(), block=1)
    known: Any = type(hf_wrap())
    assert isinstance(type("Mine", (known,), {})(hf_clip(), block=1), known)


def siglip(**vision: Any) -> Any:
    text = TEXT | {"projection_size": WIDTH}
    return hf.SiglipModel(hf.SiglipConfig(vision_config=VISION | vision, text_config=text))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), "CLIPVisionModel is not a CLIP that it knows"),
        (lambda: hf.Siglip2Model(hf.Siglip2Config(vision_config=VISION, text_config=TEXT)), "Siglip2Model is not a"),
        (lambda: siglip(vision_use_head=False), "hands out no pooled features"),
        (lambda: dual(hf.ViTModel(hf.ViTConfig(**VISION), add_pooling_layer=False)), "hands out no pooled features"),
        (lambda: dual(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION))), "rotates queries and keys"),
        (lambda: vtoken.apply(hf_clip().eval(), "tome", r=2), r"carries a method.*vtoken\.remove\(model\)"),
    ],
)  # fmt: skip
def test_refusals(build: Any, said: str) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vtoken.UnsupportedModelError, match=said):
        vtoken.AttentiveMaskCLIP(model, block=1, freeze_patch_embed=True)
    assert_same("weights", before, model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_verbs_name_the_model_inside_and_settings_travel(tmp_path: Any) -> None:
    wrapper, given = hf_wrap(keep_ratio=0.25), hf_batch()
    with pytest.raises(vtoken.InputError, match=r"input_ids are \(4, 3, 32, 32\).*give pixel_values= and input_ids="):
        wrapper(given["pixel_values"], given["input_ids"])
    with pytest.raises(vtoken.UnsupportedModelError, match=r"use model\.model"):
        vtoken.apply(wrapper, vtoken.ToMe(r=2))
    vtoken.save_settings(wrapper, tmp_path)
    vtoken.load_settings(wrapper, tmp_path)
    with pytest.raises(vtoken.ConfigError, match="is not applied but built"):
        vtoken.load_settings(hf_wrap(), tmp_path)


def test_a_method_works_in_eval_mode_and_is_refused_in_training() -> None:
    wrapper, given = hf_wrap(), hf_batch()
    vtoken.apply(wrapper.model, vtoken.ToMe(r=4))
    assert_same("merged", wrapper.model.eval()(**given), wrapper.eval()(**given))
    with pytest.raises(vtoken.UnsupportedModelError, match="carries a method"):
        wrapper.train()(**given)
    vtoken.remove(wrapper.model)
    wrapper(**given)


def test_a_frozen_patch_embedding() -> None:
    wrapper = hf_wrap(freeze_patch_embed=True)
    assert not wrapper.model.vision_model.embeddings.patch_embedding.weight.requires_grad
    wrapper.requires_grad_(True)
    frozen = {n for n, p in wrapper.model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_model.embeddings.patch_embedding.weight"}


@pytest.mark.parametrize("name", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_the_training_forward_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    wrapper, given = hf_wrap(name), hf_batch()
    compiled = torch.compile(wrapper, fullgraph=True, backend="eager")
    assert_close("loss", wrapper(**given).loss, compiled(**given).loss, 1e-6)
    compiled(**given).loss.backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)
    torch._dynamo.reset()
