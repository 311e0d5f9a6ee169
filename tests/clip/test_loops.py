"""The wrapper in training loops: open_clip's own, scalers, accumulation, checkpointing, compilation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip import ClipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor

import vtoken
from tests.clip.models import batch, clip, gradients, timm_clip, wrap
from tests.helpers import assert_all_close, assert_close, assert_same

STEPS = 2


class Data:
    """What open_clip's loop asks of its training data."""

    def __init__(self, batches: list[tuple[Any, Tensor]]) -> None:
        self.dataloader = self
        self._batches = batches
        self.num_batches, self.num_samples = len(batches), 4 * len(batches)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to shuffle."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class Views(list[Tensor]):
    """Two views that open_clip's loop may move to a device as one."""

    def to(self, **where: Any) -> Views:
        return Views(x.to(**where) for x in self)

    def __len__(self) -> int:
        return super().__len__()


def train(
    wrapper: Any, loss: Any, batches: list[Any], accum: int = 1, precision: str = "fp32", *, attach: bool = True
) -> Any:
    optimizer = torch.optim.AdamW([p for p in wrapper.parameters() if p.requires_grad], lr=1e-3)
    if attach:
        wrapper.attach_ema(optimizer)
    args = SimpleNamespace(
        device="cpu", precision=precision, accum_freq=accum, distill=False, skip_scheduler=True, horovod=False,
        grad_clip_norm=None, log_every_n_steps=1, rank=0, local_rank=0, world_size=1, batch_size=4, wandb=False,
    )  # fmt: skip
    train_one_epoch(wrapper, {"train": Data(batches)}, loss, 0, optimizer, None, None, None, args)
    return optimizer


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("ours", [False, True], ids=["ClipLoss", "AttentiveMaskLoss"])
def test_open_clips_own_loop(precision: str, accum: int, ours: bool) -> None:
    """Unmodified; with our loss two views and both heads, without one view and none."""
    batches: list[Any] = [batch(seed=i) for i in range(STEPS * accum)]
    loss: Any = ClipLoss()
    options: dict[str, Any] = {"total_steps": 8, "momentum": 0.9}
    if ours:
        batches = [(Views([x, x.flip(0).mul(0.5) + x]), t) for x, t in batches]
        loss, options = vtoken.AttentiveMaskLoss(), options | {"simclr_weight": 1.0, "byol_weight": 1.0}
        options["head_norm"] = "layer"
    wrapper = wrap(**options)
    before = {n: p.clone() for n, p in wrapper.named_parameters()}
    train(wrapper, loss, batches, accum, precision)
    assert int(wrapper.ema_step) == STEPS
    for name, p in wrapper.named_parameters():
        if "key" not in name:
            assert not torch.equal(p, before[name]), name
        assert p.dtype == torch.float32
        assert bool(p.isfinite().all())
    plain = clip()
    plain.load_state_dict({n.removeprefix("model."): v for n, v in wrapper.state_dict().items() if "model." in n})


def test_the_loop_is_the_plain_one_without_masks() -> None:
    """With keep_ratio=1 open_clip's loop leaves the same weights as on the bare model."""
    batches = [batch(seed=i) for i in range(STEPS)]
    wrapper, bare = wrap(keep_ratio=1.0), clip()
    train(wrapper, ClipLoss(), batches)
    train(bare, ClipLoss(), batches, attach=False)
    assert_same("weights", bare.state_dict(), wrapper.model.state_dict())


def test_accumulation_keeps_the_masks_and_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature caching gives the gradients of the whole batch, but for logit_scale's, and each mask twice."""
    x, t = batch(8)
    seen: list[Tensor] = []
    wrapper = wrap()
    stock = vtoken.AttentiveMasks.choose

    def watch(self: Any, *args: Any) -> Tensor:
        seen.append(stock(self, *args))
        return seen[-1]

    monkeypatch.setattr(vtoken.AttentiveMasks, "choose", watch)
    train(wrapper, ClipLoss(), [(x[:4], t[:4]), (x[4:], t[4:])], accum=2)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
    accumulated = gradients(wrapper.model)
    whole = wrap()
    ClipLoss()(**whole(x, t)).backward()
    expected = gradients(whole.model)
    assert expected.keys() == accumulated.keys()
    for name, grad in expected.items():
        if float(grad.abs().max()) > 1e-5 and name != "logit_scale":
            assert_close(name, grad, accumulated[name], 1e-5)
    assert_close("logit_scale", 2 * expected["logit_scale"], accumulated["logit_scale"], 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool) -> None:
    wrapper, (x, t) = wrap(), batch()
    optimizer = torch.optim.AdamW(wrapper.model.parameters(), fused=fused)
    wrapper.attach_ema(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    teacher = copy.deepcopy(wrapper.teacher.state_dict())
    for step, bad in enumerate((True, False, True, False)):
        optimizer.zero_grad()
        scaler.scale(vtoken.AttentiveMaskLoss()(**wrapper(x, t))).backward()
        if bad:
            wrapper.model.visual.proj.grad[0, 0] = torch.inf
        weights = copy.deepcopy(wrapper.model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        assert int(wrapper.ema_step) == (step + 1) // 2
        if bad:
            assert_same("weights of a skipped step", weights, wrapper.model.state_dict())
        if step == 0:
            assert_same("teacher", teacher, wrapper.teacher.state_dict())
    assert not torch.equal(teacher["visual.proj"], wrapper.teacher.visual.proj)


def test_attach_ema_refuses_what_would_do_harm() -> None:
    wrapper = wrap()
    optimizer = torch.optim.SGD(wrapper.parameters(), 0.1)
    handle = wrapper.attach_ema(optimizer)
    with pytest.raises(vtoken.ConfigError, match="twice"):
        wrapper.attach_ema(optimizer)
    with pytest.raises(vtoken.ConfigError, match="no trainable parameter of this model"):
        wrapper.attach_ema(torch.optim.SGD(clip().parameters(), 0.1))
    with pytest.raises(vtoken.ConfigError, match="no trainable parameter of this model"):
        wrapper.attach_ema(torch.optim.SGD(wrapper.teacher.parameters(), 0.1))
    handle.remove()
    wrapper.attach_ema(optimizer)


@pytest.mark.parametrize("timm_tower", [False, True])
def test_checkpointing_gives_identical_gradients(timm_tower: bool) -> None:
    found = []
    for checkpointed in (False, True):
        wrapper = wrap(timm_clip() if timm_tower else clip(), simclr_weight=1.0, byol_weight=1.0)
        wrapper.set_grad_checkpointing(checkpointed)
        core = wrapper.visual.trunk if timm_tower else wrapper.visual.transformer
        assert core.grad_checkpointing is checkpointed
        x, t = batch(4, 160 if timm_tower else 32)
        out = [wrapper([x, 0.5 * x], t), wrapper([x.flip(0), x], t)]  # two forwards before one backward
        sum(vtoken.AttentiveMaskLoss()(**each) for each in out).backward()
        found.append(gradients(wrapper))
    assert_same("gradients", *found)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["builtin", "own", "timm", "heads", "boxes"])
def test_the_training_forward_compiles_to_one_graph(kind: str) -> None:
    timm_tower = kind == "timm"
    model = timm_clip(timm_pool="avg") if timm_tower else clip(layers=2, **({"qk_norm": True} if kind == "own" else {}))
    options: dict[str, Any] = {"byol_weight": 1.0, "simclr_weight": 1.0} if kind == "heads" else {}
    wrapper = wrap(model, **options, teacher_scale=0.4 if timm_tower else 0.5)
    x, t = batch(4, 160 if timm_tower else 32)
    views, extra = [x, x.roll(3, 2)], {}
    if kind == "boxes":
        boxes = torch.tensor([[[0, 0, 32, 32], [3, 0, 32, 32]]] * 4)
        extra = {"teacher_image": x, "view_boxes": boxes, "teacher_boxes": boxes[:, 0]}
    backend = "aot_eager" if kind == "heads" else "eager"  # the former also traces the backward, and takes long
    compiled = torch.compile(wrapper, fullgraph=True, backend=backend)
    found, outputs = [], []
    for each in (wrapper, compiled):
        wrapper.zero_grad()
        outputs.append(each(views, t, **extra))
        vtoken.AttentiveMaskLoss()(**outputs[-1]).backward()
        found.append(gradients(wrapper))
    assert_all_close("output", *outputs, 1e-5)
    for name, grad in found[0].items():
        if float(grad.abs().max()) > 1e-5:
            assert_close(name, grad, found[1][name], 1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
def test_steps_do_not_recompile() -> None:
    """But the end of the warm-up and another ratio do, once each."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    wrapper, (x, t) = wrap(warmup_steps=2), batch()
    compiled = torch.compile(wrapper, fullgraph=True, backend=count)
    counts = []
    for step in range(6):
        if step == 4:
            wrapper.keep_ratio = 0.25
        assert_same(f"step {step}", wrapper(x, t), compiled(x, t))
        wrapper.update_ema()
        counts.append(len(graphs))
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("mode", ["random", "sample", "mix", "lowest"])
def test_other_modes_compile(mode: str) -> None:
    wrapper, (x, t) = wrap(clip(layers=2), mode=mode), batch()
    out = torch.compile(wrapper, fullgraph=True, backend="eager")(x, t)
    assert out["image_features"].shape == (4, 16)
    assert not torch.equal(out["image_features"], wrap(clip(layers=2), keep_ratio=1.0)(x, t)["image_features"])
