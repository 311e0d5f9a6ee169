"""The teacher follows a student whose training script knows nothing of it: no attach_ema, no update_ema."""

from __future__ import annotations

import copy
import gc
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import ClipLoss
from torch import Tensor, nn

import vtoken
from tests.clip.models import EMBED, TEXT, VISION, batch, clip, wrap
from tests.clip.test_loops import train
from tests.helpers import assert_close, assert_same

MOMENTUM = 0.9


def made(**options: Any) -> vtoken.AttentiveMaskCLIP:
    return wrap(clip(), momentum=MOMENTUM, **options)


def adam(wrapper: nn.Module, kind: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> Any:
    return kind([p for p in wrapper.parameters() if p.requires_grad], lr=1e-2, **options)


def backward(model: Any, seed: int = 0, scale: float = 1.0) -> None:
    (scale * ClipLoss()(**model(*batch(seed=seed)))).backward()


def averages(wrapper: Any) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in wrapper.teacher.named_parameters()}


def told(run: Callable[[Any, Any], None], **options: Any) -> tuple[Any, Any]:
    """The same training with attach_ema and without a word."""
    wrappers = made(**options), made(**options)
    for index, wrapper in enumerate(wrappers):
        optimizer = adam(wrapper)
        if index == 0:
            wrapper.attach_ema(optimizer)
        run(wrapper, optimizer)
    return wrappers


def check(attached: Any, alone: Any, steps: int) -> None:
    assert int(attached.ema_step) == int(alone.ema_step) == steps
    assert_same("teacher", attached.teacher.state_dict(), alone.teacher.state_dict())
    assert_same("student", attached.model.state_dict(), alone.model.state_dict())


@pytest.mark.parametrize("mode", ["topk", "random"])
def test_it_is_as_with_an_attached_optimiser(mode: str) -> None:
    """Step by step, with masks or without a teacher in the forward; the warm-up counts steps too."""

    def run(wrapper: Any, optimizer: Any) -> None:
        torch.manual_seed(3)
        for step in range(4):
            optimizer.zero_grad()
            backward(wrapper, step)
            optimizer.step()

    check(*told(run, mode=mode, warmup_steps=2), 4)


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_open_clips_loop_without_attach_ema(accum: int, precision: str) -> None:
    """Its accumulation looks at every batch twice, and it clamps the logit scale after every step."""
    batches = [batch(seed=i) for i in range(3 * accum)]
    attached, alone = made(total_steps=5), made(total_steps=5)
    alone_start = averages(alone)
    train(attached, ClipLoss(), batches, accum, precision)
    train(alone, ClipLoss(), batches, accum, precision, attach=False)
    check(attached, alone, 3)
    assert not torch.equal(alone_start["visual.proj"], alone.teacher.visual.proj)


def test_a_checkpoint_as_open_clips_main_writes_it_has_the_last_step(tmp_path: Path) -> None:
    """The state dict is taken right after the last step, before anything else could look."""
    attached, alone = made(), made()
    for wrapper in (attached, alone):
        train(wrapper, ClipLoss(), [batch(seed=i) for i in range(2)], attach=wrapper is attached)
    state = nn.ModuleDict({"module": alone}).state_dict()  # through a parent, as DDP
    assert int(state["module.ema_step"]) == 2
    assert_same("teacher", attached.state_dict(), {k.removeprefix("module."): v for k, v in state.items()})


def test_forwards_are_not_steps() -> None:
    """Accumulated micro-batches, forwards without gradient, evaluation, checkpointing that runs blocks again."""
    wrapper = made()
    optimizer = adam(wrapper)
    wrapper.set_grad_checkpointing(True)
    for step in range(1, 4):
        for micro in range(3):
            backward(wrapper, micro, 1 / 3)
            with torch.no_grad():
                wrapper(*batch())
            wrapper.eval()(*batch())
            wrapper.train()
        assert int(wrapper.ema_step) == step - 1
        optimizer.step()
        optimizer.zero_grad()
        wrapper.eval()
        with torch.inference_mode():
            wrapper(*batch())
        wrapper.train()
        assert int(wrapper.ema_step) == step


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_every_form_of_an_optimiser(kind: Any, options: dict[str, Any]) -> None:
    """Fused ones do not count up the version of what they change."""
    wrapper = made()
    optimizer = adam(wrapper, kind, **options)
    for step in range(1, 3):
        optimizer.zero_grad()
        backward(wrapper)
        optimizer.step()
        assert int(wrapper.ema_step) == step


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count_without_attach(fused: bool) -> None:
    wrapper = made()
    optimizer, scaler = adam(wrapper, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, bad in enumerate((True, False, True, False)):
        optimizer.zero_grad()
        scaler.scale(ClipLoss()(**wrapper(*batch()))).backward()
        if bad:
            wrapper.model.visual.proj.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            wrapper.logit_scale.clamp_(0, 4.6)
        assert int(wrapper.ema_step) == (step + 1) // 2


def test_loading_weights_is_no_step() -> None:
    wrapper, other = made(), clip(seed=5)
    optimizer = adam(wrapper)
    wrapper.model.load_state_dict(other.state_dict())
    wrapper.train()(*batch())
    assert int(wrapper.ema_step) == 0
    backward(wrapper)
    optimizer.step()
    saved = copy.deepcopy(wrapper.state_dict())
    optimizer.zero_grad()
    backward(wrapper)
    wrapper.load_state_dict(saved)
    wrapper(*batch())
    assert int(wrapper.ema_step) == 1
    assert_same("loaded", saved, wrapper.state_dict())


def test_whoever_reads_the_teacher_finds_the_last_step() -> None:
    x, _ = batch()
    reads: dict[str, Callable[[Any], Any]] = {
        "score": lambda w: w.score(x), "encode_image": lambda w: w.encode_image(x, ema=True),
        "unwrap": lambda w: w.unwrap(ema=True).visual.proj, "teacher": lambda w: w.teacher.visual.proj,
        "copy": lambda w: copy.deepcopy(w).teacher.visual.proj,
        "eval": lambda w: w.eval()._modules["teacher"].visual.proj,
    }  # fmt: skip
    for name, read in reads.items():
        found = []
        for attach in (True, False):
            wrapper = made()
            optimizer = adam(wrapper)
            if attach:
                wrapper.attach_ema(optimizer)
            backward(wrapper)
            optimizer.step()
            with torch.no_grad():
                found.append(read(wrapper))
        assert torch.equal(*found), name


def test_whoever_calls_it_himself_is_left_alone() -> None:
    """Neither twice with update_ema, nor with an optimiser that is attached late; and no hook stays behind."""
    wrapper = made()
    optimizer = adam(wrapper)
    for step in range(1, 4):
        optimizer.zero_grad()
        backward(wrapper)
        optimizer.step()
        wrapper.update_ema()
        assert int(wrapper.ema_step) == step
    late = made()
    optimizer = adam(late)
    for step in range(1, 4):
        if step == 2:
            late.attach_ema(optimizer)
        optimizer.zero_grad()
        backward(late)
        optimizer.step()
    check(wrapper, late, 3)
    assert not any(p._post_accumulate_grad_hooks for w in (wrapper, late) for p in w.model.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_follow_their_own_student(how: str) -> None:
    wrapper = made()
    optimizer = adam(wrapper)
    wrapper.attach_ema(optimizer)
    if how == "deepcopy":
        copied = copy.deepcopy(wrapper)
    else:
        file = io.BytesIO()
        torch.save(wrapper, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    for step in range(1, 3):
        optimizer = adam(copied)
        backward(copied)
        optimizer.step()
        assert int(copied.ema_step) == step
    assert int(wrapper.ema_step) == 0


def test_a_frozen_image_tower_counts_the_steps_of_the_text_tower() -> None:
    wrapper = made(warmup_steps=1)
    wrapper.model.visual.requires_grad_(False)
    optimizer = adam(wrapper)
    for step in range(1, 4):
        backward(wrapper)
        optimizer.step()
        assert int(wrapper.ema_step) == step
    assert_close("teacher", wrapper.model.visual.proj, wrapper.teacher.visual.proj, 1e-6)


def test_a_wrapper_that_is_gone_leaves_the_model_as_it_was() -> None:
    model = clip()
    wrapper = wrap(model)
    backward(wrapper)
    del wrapper
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_forwards_are_followed_too() -> None:
    """At the next backward, with the weights after the step: the averages are those of every other way."""
    attached, alone = (wrap(clip(layers=2), momentum=MOMENTUM, keep_ratio=1.0, warmup_steps=9) for _ in range(2))
    for wrapper in (attached, alone):
        optimizer = adam(wrapper)
        if wrapper is attached:
            wrapper.attach_ema(optimizer)
        compiled = torch.compile(wrapper, fullgraph=True, backend="eager").train()
        for step in range(3):
            optimizer.zero_grad()
            backward(compiled, step)
            assert wrapper is attached or int(wrapper._buffers["ema_step"]) == step
            optimizer.step()
    check(attached, alone, 3)


def test_nothing_is_said(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper = made()
        optimizer = adam(wrapper)
        for _ in range(2):
            backward(wrapper)
            optimizer.step()
    assert not recwarn.list


def test_a_checkpoint_goes_into_plain_open_clip() -> None:
    """The lines of docs/tasks/train_clip.md, with and without the prefix of a distributed run."""
    lines = "".join(text for text in _programs() if "state_dict()" in text or "load_state_dict" in text)
    wrapper = made()
    train(wrapper, ClipLoss(), [batch()], attach=False)
    for prefix in ("", "module."):
        file = io.BytesIO()
        torch.save({"epoch": 1, "state_dict": {prefix + k: v for k, v in wrapper.state_dict().items()}}, file)
        file.seek(0)
        plain = open_clip.CLIP(EMBED, VISION, TEXT, output_dict=True)
        names: dict[str, Any] = {"clip": wrapper, "model": plain, "checkpoint": file, "torch": torch, "vtoken": vtoken}
        saved: dict[str, Any] = {}
        names["keep"] = lambda state, path, saved=saved: saved.update({path: state})
        exec(compile(lines.replace("torch.save(", "keep("), "docs/tasks/train_clip.md", "exec"), names)
        assert_same("student", wrapper.model.state_dict(), plain.state_dict())
        assert_same("student", wrapper.unwrap().state_dict(), saved["student.pt"])
        assert_same("average", wrapper.unwrap(ema=True).state_dict(), saved["teacher.pt"])
        plain.load_state_dict(saved["teacher.pt"])


def _programs() -> list[str]:
    text = (Path(__file__).resolve().parents[2] / "docs/tasks/train_clip.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)
