"""A transformers `Trainer` trains the wrapper as it is: the teacher moves, checkpoints resume to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.data import Dataset

import vtoken
from tests.clip.hf_models import hf_batch, hf_wrap
from tests.helpers import assert_close, assert_same

STEPS, BATCH = 4, 4


class Pictures(Dataset[dict[str, Tensor]]):
    """Pictures with captions, and a column that no model knows."""

    def __init__(self, size: int = 16) -> None:
        self._given = hf_batch(size)

    def __len__(self) -> int:
        return len(self._given["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        names = ("input_ids", "pixel_values", "attention_mask")
        return {name: self._given[name][index] for name in names} | {"url": torch.zeros(1)}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """As the scripts that train CLIPs do it."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"return_loss": True}


def trainer(model: Any, folder: Path, cls: Any = hf.Trainer, **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
    }  # fmt: skip
    return cls(
        model=model, args=hf.TrainingArguments(**(given | options)), train_dataset=Pictures(), data_collator=collate
    )


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_teacher_moves_by_the_closed_form(name: str, tmp_path: Path) -> None:
    """As often as the optimiser steps, and by its weights; the column that no model knows is gone."""
    wrapper = hf_wrap(name, momentum=0.9, total_steps=STEPS)
    expected = {n: p.detach().clone() for n, p in wrapper.model.named_parameters()}

    class Follow(hf.TrainerCallback):
        step = 0

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.step += 1
            m = wrapper.momentum_at(self.step)
            for n, p in wrapper.model.named_parameters():
                expected[n] = m * expected[n] + (1 - m) * p.detach()

    made = trainer(wrapper, tmp_path)
    made.add_callback(Follow())
    start = {n: p.clone() for n, p in wrapper.model.state_dict().items()}
    made.train()
    assert int(wrapper.ema_step) == STEPS
    for n, average in wrapper.teacher.named_parameters():
        assert_close(n, expected[n], average, 1e-5)
        assert not torch.equal(start[n], average), n
        assert not torch.equal(wrapper.model.get_parameter(n), average), n


@pytest.mark.parametrize("mode", ["topk", "random"])
def test_a_checkpoint_resumes_to_the_bit(mode: str, tmp_path: Path) -> None:
    """Student, teacher, steps and optimiser; the random masks, too, since Trainers save torch's generator."""
    options: dict[str, Any] = {"momentum": 0.9, "total_steps": STEPS, "mode": mode}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = hf_wrap(**options)
    trainer(whole, tmp_path / "whole", **saving).train()
    resumed = hf_wrap(**options)
    with torch.no_grad():  # whatever is there is loaded over
        for p in resumed.parameters():
            p.add_(1.0)
    made = trainer(resumed, tmp_path / "resumed", **saving)
    made.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert int(resumed.ema_step) == STEPS
    assert_same("state", whole.state_dict(), resumed.state_dict())


def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    """The gradient is the mean of the parts', as for any model whose loss is a mean."""
    wrapper, plain = hf_wrap(momentum=0.9, keep_ratio=1.0), hf_wrap(momentum=0.9, keep_ratio=1.0)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    made = trainer(wrapper, tmp_path, optim="sgd", lr_scheduler_type="constant", **options)
    seen: list[Any] = []
    wrapper.model.vision_model.register_forward_pre_hook(
        lambda m, a, given: seen.append(given["pixel_values"].clone()), with_kwargs=True
    )
    made.train()
    assert int(wrapper.ema_step) == 2
    assert len(seen) == 4
    data = {float(p["pixel_values"].sum()): p for p in (Pictures()[i] for i in range(16))}
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=1e-2)
    for step in (seen[:2], seen[2:]):
        for x in step:
            rows = collate([data[float(image.sum())] for image in x])
            del rows["url"]
            (plain(**rows).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (n, expected), found in zip(plain.named_parameters(), wrapper.parameters(), strict=True):
        assert_close(n, expected, found, 1e-4)
    assert int(plain.ema_step) == 2


def test_what_is_saved_is_a_checkpoint_of_the_wrapper_and_a_model(tmp_path: Path) -> None:
    """`save_model` writes all that resumes; `save_pretrained` what `from_pretrained` reads."""
    wrapper = hf_wrap(momentum=0.9)
    made = trainer(wrapper, tmp_path)
    made.train()
    made.save_model(str(tmp_path / "all"))
    again = hf_wrap()
    from safetensors.torch import load_file

    again.load_state_dict(load_file(tmp_path / "all" / "model.safetensors"))
    assert_same("all", wrapper.state_dict(), again.state_dict())
    wrapper.save_pretrained(tmp_path / "model")
    model = hf.CLIPModel.from_pretrained(tmp_path / "model")
    assert_same("model", wrapper.model.state_dict(), model.state_dict())


def test_evaluation_sees_whole_pictures(tmp_path: Path) -> None:
    wrapper = hf_wrap(keep_ratio=0.1)
    made = trainer(wrapper, tmp_path, per_device_eval_batch_size=8)
    loss = made.evaluate(Pictures(8))["eval_loss"]
    given = hf_batch(8)
    assert abs(loss - wrapper.model.eval()(**given).loss.item()) < 1e-5
    assert wrapper.teacher.training is False


def test_two_views_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    """A collator gives views as a list; `compute_loss_func` gets the output, here for features of several processes."""

    def views(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        given = collate(rows)
        return given | {"pixel_values": [given["pixel_values"], given["pixel_values"].flip(0)]}

    wrapper = hf_wrap(momentum=0.9)
    seen: list[Any] = []

    def loss(out: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        found = vtoken.AttentiveMaskLoss()(out.image_embeds, out.text_embeds, wrapper.logit_scale.exp())
        seen.append((float(found.detach()), float(out.loss.detach())))
        return found

    made = trainer(wrapper, tmp_path)
    made.data_collator, made.compute_loss_func = views, loss
    made.train()
    assert int(wrapper.ema_step) == STEPS
    assert seen
    assert all(abs(a - b) < 1e-5 for a, b in seen)


@pytest.mark.parametrize("precision", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_settings_of_a_trainer(precision: dict[str, Any], tmp_path: Path) -> None:
    wrapper = hf_wrap(momentum=0.9)
    trainer(wrapper, tmp_path, **precision).train()
    assert int(wrapper.ema_step) == STEPS
    assert all(bool(p.isfinite().all()) for p in wrapper.parameters())


def test_the_pages_program_runs(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/methods/attentive_clip.md").read_text()
    (text,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"folder": str(tmp_path)}
    exec(compile(text, "docs/methods/attentive_clip.md", "exec"), names)
    student, teacher = (hf.CLIPModel.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    assert_same("student", names["model"].state_dict(), student.state_dict())
    assert torch.equal(student.text_projection.weight, teacher.text_projection.weight)
    assert not torch.equal(student.visual_projection.weight, teacher.visual_projection.weight)
