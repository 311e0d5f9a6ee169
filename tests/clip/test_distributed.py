"""Two processes with half the batch each: the gradients of the whole batch, teachers that stay equal to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from open_clip import ClipLoss
from torch.nn.parallel import DistributedDataParallel

import vtoken
from tests.clip.hf_models import hf_batch, hf_wrap
from tests.clip.models import batch, clip, gradients, wrap
from tests.helpers import assert_close, assert_same

WORLD, STEPS = 2, 2
CASES: dict[str, dict[str, Any]] = {
    "one view": {},
    "open_clip's loss": {},
    "transformers": {},
    "heads": {"simclr_weight": 1.0, "byol_weight": 1.0, "head_norm": "layer"},
}


def step(wrapper: Any, model: Any, name: str, rank: int, world: int, seed: int) -> None:
    """Forward and backward of this process's share of a batch of eight."""
    if name == "transformers":
        given = {n: v.chunk(world)[rank] for n, v in hf_batch(8, seed=seed).items() if n != "return_loss"}
        model.zero_grad()
        out = model(**given)
        loss = vtoken.AttentiveMaskLoss(rank=rank, world_size=world)
        loss(out.image_embeds, out.text_embeds, wrapper.logit_scale.exp()).backward()
        assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)
        return
    x, t = (part.chunk(world)[rank] for part in batch(8, seed=seed))
    contrastive = None
    if name == "open_clip's loss":
        contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    loss = vtoken.AttentiveMaskLoss(contrastive, rank=rank, world_size=world)
    views = [x, x.roll(3, 3)] if name == "heads" else x
    model.zero_grad()
    loss(**model(views, t)).backward()
    assert all(p.grad is not None for p in wrapper.parameters() if p.requires_grad)


def run(name: str, rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients of the first step, and the state after two."""
    wrapper = hf_wrap() if name == "transformers" else wrap(clip(), **CASES[name])
    model = wrapper if world == 1 else DistributedDataParallel(wrapper, find_unused_parameters=False)
    optimizer = torch.optim.SGD(wrapper.parameters(), 0.01)
    wrapper.attach_ema(optimizer)
    first: dict[str, Any] = {}
    for seed in range(STEPS):
        step(wrapper, model, name, rank, world, seed)
        first = first or gradients(wrapper)
        optimizer.step()
    return first, wrapper.state_dict()


def worker(rank: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.save({name: run(name, rank, WORLD) for name in CASES}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name in CASES:
        expected, state = run(name, 0, 1)
        (found, first), (_, second) = (each[name] for each in both)
        assert_same(f"{name}: states of the two", first, second)
        assert int(first["ema_step"]) == STEPS
        teacher = next(key for key in first if key.startswith("teacher.") and "0.mlp" in key)
        assert not torch.equal(first[teacher], first[teacher.replace("teacher", "model")])
        assert expected.keys() == found.keys()
        for key, grad in expected.items():
            if float(grad.abs().max()) > 1e-5:
                assert_close(f"{name} {key}", grad, found[key], 1e-5)
        for key, value in state.items():
            assert_close(f"{name} {key}", value.double(), first[key].double(), 1e-5)
