"""Attention methods in the hosts: what patching keeps, what is refused, image sizes, masks, hooks."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import Tensor

import vtoken
from tests.contract.table import host as host_row
from tests.contract.table import run, snapshot
from tests.helpers import assert_close, assert_same, images, naflex, randomise_, vit
from tests.methods.sparse_hosts import DISTILLED, HOSTS, against_loops, block_rows, blocks, open_clip_tower, sparse

CONFIG = vtoken.Sparsifiner(keep_ratio=0.4)
each_host = pytest.mark.parametrize("name", HOSTS)


@each_host
def test_removal_restores_the_same_objects(name: str) -> None:
    model, x = HOSTS[name].model(), HOSTS[name].images()
    stock, before, keys = run(model, x), snapshot(model), list(model.state_dict())
    attentions = [id(b.attn) for b in blocks(model)]
    parameters = [id(p) for p in model.parameters()]
    sparse(model, CONFIG)
    assert [id(b.attn) for b in blocks(model)] == attentions
    added = [k for k in model.state_dict() if k not in keys]
    assert [k for k in model.state_dict() if k in keys] == keys
    assert len(added) == 7 * 3
    assert all(".attn.predictor." in k for k in added)
    run(model, x)
    vtoken.remove(model)
    assert snapshot(model) == before
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == keys
    assert_same("after removal", stock, run(model, x))


@each_host
def test_the_class_of_every_module_keeps_its_name(name: str) -> None:
    model = HOSTS[name].model()
    classes = [type(m) for m in model.modules()]
    vtoken.apply(model, CONFIG)
    kept = [m for n, m in model.named_modules() if "predictor" not in n]
    for module, cls in zip(kept, classes, strict=True):
        assert isinstance(module, cls)
        assert (type(module).__name__, type(module).__module__) == (cls.__name__, cls.__module__)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_apply_follows_the_models_mode_dtype_and_flags(training: bool, dtype: torch.dtype) -> None:
    model = HOSTS["cls"].model(dtype=dtype).train(training).requires_grad_(False)
    vtoken.apply(model, CONFIG)
    assert all(m.training is training for m in model.modules())
    assert all(p.dtype == dtype for p in model.parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in vtoken.train.predictor_parameters(model)
    ]
    meta = vtoken.apply(vit().to("meta"), CONFIG)
    assert all(p.device.type == "meta" for p in meta.parameters())


def test_eval_mode_remembers_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = sparse(HOSTS["cls"].model(), CONFIG), HOSTS["cls"].images()
    out, made = run(model, x), []
    cls = type(blocks(model)[0].attn.predictor)
    make = cls._make_basis
    monkeypatch.setattr(cls, "_make_basis", lambda self, grid: made.append(1) or make(self, grid))
    assert_same("again", out, run(model, x))
    assert not made
    run(model.train(), x)
    assert len(made) == 3


@each_host
def test_checkpoints(name: str) -> None:
    """Plain ones lack the predictors only; those of a patched model load strictly into another one."""
    model, other, x = HOSTS[name].model(), HOSTS[name].model(seed=3), HOSTS[name].images()
    plain = {k: v.clone() for k, v in other.state_dict().items()}
    sparse(model, CONFIG, seed=1)
    predictors = {k: v.clone() for k, v in model.state_dict().items() if "predictor" in k}
    result = model.load_state_dict(plain, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(predictors)
    with pytest.raises(RuntimeError, match="predictor"):
        model.load_state_dict(plain)
    vtoken.apply(other, CONFIG)
    assert not torch.equal(run(model, x), run(other, x))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file), strict=True)
    assert_same("loaded", run(model, x), run(other, x))


@each_host
def test_a_failing_apply_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtoken.core import patch as patching

    model, x = HOSTS[name].model(), HOSTS[name].images()
    stock, before = run(model, x), snapshot(model)
    derive, calls = patching.derive, [0]

    def failing(base: type, mixin: type) -> type:
        calls[0] += 1
        if calls[0] == 7:  # the model, three blocks, three attentions
            raise RuntimeError("injected")
        return derive(base, mixin)

    monkeypatch.setattr(patching, "derive", failing)
    with pytest.raises(RuntimeError, match="injected"):
        vtoken.apply(model, CONFIG)
    assert snapshot(model) == before
    assert_same("after the failure", stock, run(model, x))
    calls[0] = -99
    sparse(model, CONFIG)
    out, carried, keys = run(model, x), snapshot(model), list(model.state_dict())
    calls[0] = 2
    with pytest.raises(RuntimeError, match="injected"):
        vtoken.apply(model, CONFIG.replace(num_basis=2), replace=True)
    assert snapshot(model) == carried
    assert list(model.state_dict()) == keys
    assert_same("still the old one", out, run(model, x))


def test_replacing() -> None:
    model, x = HOSTS["cls"].model(), HOSTS["cls"].images()
    stock, keys = run(model, x), list(model.state_dict())
    sparse(model, CONFIG)
    with pytest.raises(vtoken.AlreadyAppliedError, match="sparsifiner"):
        vtoken.apply(model, vtoken.PiToMe(ratio=0.8))
    vtoken.apply(model, CONFIG.replace(num_basis=2, layers=(1,)), replace=True)
    assert blocks(model)[1].attn.predictor.w_up.shape == (25, 2)
    assert "predictor" not in dict(blocks(model)[0].attn.named_children())
    vtoken.apply(model, vtoken.PiToMe(ratio=1.0), replace=True)
    assert list(model.state_dict()) == keys
    assert_same("merging nothing", stock, run(model, x))
    vtoken.remove(model)
    assert_same("removed", stock, run(model, x))


@pytest.mark.parametrize("name", ["registers", "open_clip"])
def test_configure_sweeps(name: str) -> None:
    model, x = sparse(HOSTS[name].model(), keep_ratio=0.3), HOSTS[name].images()
    attentions = [id(b.attn.predictor) for b in blocks(model)]
    start = run(model, x)
    changes: list[dict[str, Any]] = [
        {"keep_ratio": 0.7}, {"keep_ratio": (0.3, 0.5, 1.0)}, {"mode": "grouped", "query_group": 3}, {"coef_topk": 1},
        {"basis_threshold": 0.15}, {"basis_abs": False}, {"scale": 3.0}, {"mode": "threshold"},
        {"mode": "threshold", "score_threshold": 0.001}, {"mode": "random"}, {"phase": "recon"},
    ]  # fmt: skip
    outs = [start]
    for change in changes:
        vtoken.configure(model, **change)
        fresh = sparse(HOSTS[name].model(), vtoken.config_of(model))
        if "score_threshold" in change:
            for block in blocks(fresh):
                block.attn.predictor.threshold.fill_(0.001)
        assert_same(f"{change}", run(fresh, x), run(model, x))
        assert all(float((run(model, x) - out).abs().max()) > 1e-6 for out in outs), f"{change} changed nothing"
        outs.append(run(model, x))
        back = {k: getattr(vtoken.Sparsifiner(keep_ratio=0.3), k) for k in change if k != "score_threshold"}
        vtoken.configure(model, **back)
        assert_same(f"{change} and back", start, run(model, x))
    assert [id(b.attn.predictor) for b in blocks(model)] == attentions


def test_refused_changes_leave_everything() -> None:
    model, x = sparse(HOSTS["registers"].model(), keep_ratio=0.3, layers=(0, 2)), HOSTS["registers"].images()
    out, before, config = run(model, x), snapshot(model), vtoken.config_of(model)
    settings = [copy.copy(vars(b.attn.predictor)) for b in blocks(model)[::2]]
    for change in (
        {"num_basis": 3}, {"reduce_c_factor": 4}, {"share_proj": True}, {"layers": None}, {"layers": (0,)},
        {"layers": ()}, {"keep_ratio": 2.0}, {"keep_ratio": (0.5,)}, {"mode": "none"}, {"nothing": 1},
        {"coef_topk": 2, "num_basis": 3}, {"token_keep_ratio": 0.5, "prune_after": (1,)},
    ):  # fmt: skip
        with pytest.raises(vtoken.ConfigError):
            vtoken.configure(model, **change)
        assert vtoken.config_of(model) == config
        assert snapshot(model) == before
    for old, block in zip(settings, blocks(model)[::2], strict=True):
        assert {k: v for k, v in vars(block.attn.predictor).items() if k != "_cache"} == {
            k: v for k, v in old.items() if k != "_cache"
        }
    assert_same("output", out, run(model, x))
    vtoken.configure(model, layers=(-1, 0))  # the same blocks in other words
    vtoken.configure(model, num_basis=4)  # what they have
    assert_same("output", out, run(model, x))


@each_host
@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_copies_and_pickles(name: str, mode: str) -> None:
    model, x = sparse(HOSTS[name].model(), keep_ratio=0.4, mode=mode, query_group=5), HOSTS[name].images()
    out, file = run(model, x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert_same("twin", out, run(twin, x))
        assert vtoken.config_of(twin) == vtoken.config_of(model)
        vtoken.configure(twin, keep_ratio=1.0, mode="exact")
        assert_same("the original", out, run(model, x))
        vtoken.remove(twin)
        assert not any("predictor" in k for k in twin.state_dict())
    assert vtoken.is_applied(model)
    assert_same("the original", out, run(model, x))


def test_threads_with_different_batch_and_image_sizes() -> None:
    model = sparse(randomise_(vit(dynamic_img_size=True, global_pool="avg"), 0).eval().double(), keep_ratio=0.4)
    cases = [
        images((3, 4 * r, 4 * c), batch, batch, torch.float64) for batch, r, c in ((1, 8, 8), (2, 6, 5), (3, 8, 3))
    ]
    serial, wrong, start = [run(model, x) for x in cases], [], threading.Barrier(len(cases))

    def work(index: int) -> None:
        start.wait()
        try:
            for _ in range(8):
                with torch.no_grad():
                    out, record = vtoken.trace(model, cases[index])
                assert len(record.attention) == 3
                assert_close(f"thread {index}", serial[index], out, 1e-12)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


REFUSED = ("oc_qk_norm",)


@pytest.mark.parametrize("name", REFUSED)
def test_other_attentions_are_refused_by_name(name: str) -> None:
    model, x = host_row(name).model(), host_row(name).images()
    stock, before = run(model, x), snapshot(model)
    with pytest.raises((vtoken.UnsupportedModelError, vtoken.ConfigError), match=r"Attention|on_attention"):
        vtoken.apply(model, CONFIG)
    assert snapshot(model) == before
    assert_same("after the refusal", stock, run(model, x))
    with pytest.raises((vtoken.UnsupportedModelError, vtoken.ConfigError)):
        vtoken.apply(model, [vtoken.PiToMe(), CONFIG])
    assert snapshot(model) == before
    vtoken.apply(model, vtoken.PiToMe(ratio=0.8))
    carried = snapshot(model)
    with pytest.raises((vtoken.UnsupportedModelError, vtoken.ConfigError)):
        vtoken.apply(model, CONFIG, replace=True)
    assert snapshot(model) == carried


class OwnForward(Attention):
    """A user's attention, whose own forward a method would bypass."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x)


def test_scaled_cosine_and_own_attentions_are_refused() -> None:
    pytest.importorskip("open_clip")
    for model in (open_clip_tower(scaled_cosine_attn=True), vit(attn_layer=OwnForward)):
        before = snapshot(model)
        with pytest.raises(vtoken.UnsupportedModelError, match=r"scaled cosine|OwnForward"):
            vtoken.apply(model, CONFIG)
        assert snapshot(model) == before


def test_only_the_chosen_blocks_must_be_supported() -> None:
    model = randomise_(vit(), 0).eval()
    model.blocks[1].attn.predictor = torch.nn.Identity()  # a child of that name is somebody else's
    with pytest.raises(vtoken.UnsupportedModelError, match="block 1"):
        vtoken.apply(model, CONFIG)
    vtoken.apply(model, CONFIG.replace(layers=(0, 2)))
    vtoken.remove(model)
    assert isinstance(model.blocks[1].attn.predictor, torch.nn.Identity)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (6, 4), (2, 9), (1, 7)])
def test_any_image_size(grid: tuple[int, int]) -> None:
    model = randomise_(vit(img_size=(16, 24), embed_dim=16, num_heads=2, dynamic_img_size=True), 0).eval().double()
    sparse(model, keep_ratio=0.4)
    against_loops(model, images((3, 4 * grid[0], 4 * grid[1]), dtype=torch.float64), grid, 1)


def test_set_input_size_after_apply() -> None:
    model = HOSTS["registers"].model(dtype=torch.float64)
    sparse(model, keep_ratio=0.4)
    model.set_input_size(img_size=(20, 12))
    against_loops(model, images((3, 20, 12), dtype=torch.float64), (5, 3), 3)
    with pytest.raises(AssertionError, match="height"):
        model(HOSTS["registers"].images(dtype=torch.float64))
    vtoken.configure(model, mode="grouped", query_group=4)
    assert run(model, images((3, 20, 12), dtype=torch.float64)).shape == (2, 10)
    assert vtoken.report(model).tokens == (18,) * 4


def test_checkpoints_of_another_square_grid_are_resized() -> None:
    small, large = randomise_(vit(img_size=16), 0).eval(), randomise_(vit(img_size=32), 0).eval()
    for model in (small, large):
        sparse(model, CONFIG.replace(num_basis=4))
    state = {k: v for k, v in small.state_dict().items() if "predictor" in k}
    large.load_state_dict(state, strict=False)
    w, wide = (m.blocks[0].attn.predictor.w_down.detach() for m in (small, large))
    assert wide.shape == (65, 4)
    assert_close("class row", w[:1], wide[:1], 1e-7)
    assert float(wide[1:].sum()) == pytest.approx(float(w[1:].sum()), abs=0.05 * float(w.abs().sum()))
    with pytest.raises(vtoken.ShapeError, match="square"):
        large.load_state_dict({"blocks.0.attn.predictor.w_up": torch.zeros(25, 4)}, strict=False)


@pytest.mark.parametrize("mode", ["exact", "grouped", "threshold"])
def test_a_wrong_number_of_tokens_is_an_error(mode: str) -> None:
    model = sparse(HOSTS["cls"].model(), keep_ratio=0.4, mode=mode)
    for block in (blocks(model)[0], blocks(model)[0].attn):
        with pytest.raises(vtoken.ShapeError, match="26 tokens"):
            block(torch.randn(2, 26, 16))
    dropping = sparse(randomise_(vit(patch_drop_rate=0.3), 0), keep_ratio=0.4, mode=mode)
    with pytest.raises(vtoken.ShapeError, match="45 tokens"):
        dropping.train()(images((3, 32, 32)))


def test_packed_patches_are_refused_where_masks_act() -> None:
    """Rows of 4 x 16 patches are as many as the predictors' 8 x 8, but lie elsewhere."""
    model = randomise_(naflex(class_token=True, pretrained_cfg_overlay={"input_size": (3, 32, 32)}), 0).eval()
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(16), indexing="ij")
    packed = {
        "patches": torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0)),
        "patch_coord": torch.stack([rows.flatten(), columns.flatten()], -1).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 64, dtype=torch.bool),
    }
    stock = model(packed)
    sparse(model, CONFIG)
    assert blocks(model)[0].attn.predictor.grid == (8, 8)
    for entry in (model, lambda x: model.forward_intermediates(x, output_fmt="NLC")):
        with pytest.raises(vtoken.InputError, match="NaFlex"):
            entry(packed)
    assert run(model, images((3, 32, 32))).shape == (2, 10)
    vtoken.configure(model, keep_ratio=1.0)
    assert_same("all keys kept", stock, model(packed))


@pytest.mark.parametrize("name", ["cls", "registers", "gated"])
def test_masks_of_the_caller_are_combined_with_ours(name: str) -> None:
    model, x = sparse(HOSTS[name].model(dtype=torch.float64), CONFIG), HOSTS[name].images(dtype=torch.float64)
    n = 24 + model.num_prefix_tokens
    rng = torch.Generator().manual_seed(3)
    bias, allowed = torch.randn(n, n, generator=rng, dtype=torch.float64), torch.rand(n, n, generator=rng) > 0.4
    for mask in (bias, allowed):
        with torch.no_grad(), vtoken.tracing(model, maps=("mask", "attention")) as trace:
            model(x, attn_mask=mask)
        attn, first = blocks(model)[0].attn, trace.attention[0]
        rows = []
        handle = attn.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0]))
        with torch.no_grad():
            out = model(x, attn_mask=mask)
        handle.remove()
        q, k, _ = attn.qkv(rows[0]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        logits = attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2) * 8**-0.5
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        expected = logits.masked_fill(~first.mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        assert_close("attention", expected, first.attention, 1e-10)
        vtoken.configure(model, backend="dense_masked")
        assert_close("another backend", out, model(x, attn_mask=mask), 1e-9)
        vtoken.configure(model, backend="auto")
    with pytest.raises(vtoken.InputError, match="is_causal"):
        model(x, is_causal=True)
    vtoken.configure(model, keep_ratio=1.0)
    stock = HOSTS[name].model(dtype=torch.float64)
    for options in ({"attn_mask": bias}, {"attn_mask": allowed}, {"is_causal": True}):
        assert_same("all keys kept", stock(x, **options), model(x, **options))


def test_parts_called_by_themselves_have_the_method() -> None:
    for name in ("registers", "open_clip", "open_clip rows first"):
        model = sparse(HOSTS[name].model(), CONFIG)
        embedded, rows, trace = block_rows(model, HOSTS[name].images())
        seq = (lambda t: t.transpose(0, 1)) if name.endswith("first") else (lambda t: t)
        x = seq(embedded)
        with torch.no_grad():
            for block in blocks(model):
                x = block(x)
        assert_close(name, rows, seq(x), 1e-5)
        assert trace.num_forwards == 1


def test_open_clips_attention_takes_self_attention_only() -> None:
    attn = blocks(sparse(HOSTS["open_clip"].model(), CONFIG))[0].attn
    x = torch.randn(2, 25, 16)
    out = attn(x, x, x, need_weights=False)
    assert isinstance(out, tuple)
    assert out[1] is None
    for args, options in (((x, x, x), {}), ((x, x + 0, x), {"need_weights": False}),
                          ((x, x, x), {"need_weights": False, "attn_mask": torch.zeros(25, 25)})):  # fmt: skip
        with pytest.raises(vtoken.InputError, match="self-attention"):
            attn(*args, **options)


@pytest.mark.parametrize("name", ["registers", "open_clip", "open_clip rows first"])
def test_hooks_of_users_run_once_and_are_obeyed(name: str) -> None:
    model, x, calls = HOSTS[name].model(), HOSTS[name].images(), []

    def double(module: Any, args: Any, out: Any) -> Any:
        calls.append(module)
        return (out[0] * 2, None) if isinstance(out, tuple) else out * 2

    handle = blocks(model)[1].attn.register_forward_hook(double)
    stock = run(model, x)
    sparse(model, CONFIG.replace(keep_ratio=1.0))
    assert_close("all keys", stock, run(model, x), 1e-5)
    vtoken.configure(model, keep_ratio=0.4)
    hooked = run(model, x)
    assert len(calls) == 3
    shape = {"registers": (2, 27, 16), "open_clip": (2, 25, 16), "open_clip rows first": (25, 2, 16)}[name]
    blocks(model)[1](torch.randn(shape))
    assert len(calls) == 4, "an attention that is called by itself"
    handle.remove()
    assert not torch.allclose(hooked, run(model, x), atol=1e-3)


def test_replaced_linear_layers_count() -> None:
    from tests.contract.test_contract_patching import LoraLinear

    model, merged = (sparse(HOSTS["registers"].model(), CONFIG) for _ in range(2))
    x = HOSTS["registers"].images()
    for one, other in zip(blocks(model), blocks(merged), strict=True):
        for part in ("qkv", "proj"):
            lora = LoraLinear(getattr(one.attn, part))
            setattr(one.attn, part, lora)
            with torch.no_grad():
                getattr(other.attn, part).weight += lora.up @ lora.down
    assert_close("adapted against merged weights", run(merged, x), run(model, x), 1e-4)


def test_a_distilled_model_and_a_clip() -> None:
    model = sparse(DISTILLED.model(), CONFIG)
    assert model.blocks[0].attn.predictor.num_prefix == 2
    assert run(model, DISTILLED.images()).shape == (2, 10)
    clip = host_row("oc_clip").model()
    text = {k: v.clone() for k, v in clip.state_dict().items() if not k.startswith("visual")}
    sparse(clip, CONFIG)
    added = [k for k in clip.state_dict() if "predictor" in k]
    assert all(k.startswith("visual.transformer.resblocks.") for k in added)
    assert all(torch.equal(clip.state_dict()[k], v) for k, v in text.items())
    with torch.no_grad(), vtoken.tracing(clip) as trace:
        clip.encode_image(host_row("oc_clip").images())
    assert [r.layer for r in trace.attention] == [0, 1, 2]


def test_an_open_clip_tower_with_a_timm_trunk() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
              "image_size": 160}  # fmt: skip
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    vtoken.apply(model, CONFIG)
    with torch.no_grad(), vtoken.tracing(model) as trace:
        model.encode_image(torch.randn(1, 3, 160, 160))
    assert len(trace.attention) == len(model.visual.trunk.blocks)
    vtoken.remove(model)
    assert not any("predictor" in k for k in model.state_dict())


def test_timms_own_models() -> None:
    for name in ("test_vit", "test_vit3"):
        model = timm.create_model(name, num_classes=5).eval()
        vtoken.apply(model, CONFIG)
        with torch.no_grad():
            assert model(torch.randn(1, 3, 160, 160)).shape == (1, 5)
