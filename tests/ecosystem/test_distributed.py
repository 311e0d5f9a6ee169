"""DDP with two processes, FSDP2 with one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vtoken
from tests.ecosystem.towers import PITOME, TOWERS, Tower, every_tower, gradients, loss_of
from tests.helpers import assert_close

WORLD = 2


def ddp_worker(rank: int, folder: str) -> None:
    """One process: its half of the batch through every tower, plain and checkpointed; rank 0 saves the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        for tower in TOWERS:
            mine = tower.images(batch=4).chunk(WORLD)[rank]
            model = vtoken.apply(tower.model(), PITOME).train()
            parallel = DistributedDataParallel(model)
            loss_of(parallel(mine)).backward()
            plain = gradients(model)
            model.set_grad_checkpointing(True)
            parallel.zero_grad()
            with parallel.no_sync():
                loss_of(parallel(mine)).backward()
            loss_of(parallel(mine)).backward()
            _, trace = vtoken.trace(model, mine)
            if rank == 0:
                twice = {name: grad / 2 for name, grad in gradients(model).items()}
                torch.save((plain, twice, trace.tokens), f"{folder}/{tower.name}.pt")
            with pytest.raises(vtoken.VTokenError, match=r"vtoken\.apply\(model\.module"):
                vtoken.apply(parallel, PITOME, replace=True)
            vtoken.remove(parallel)
            assert not vtoken.is_applied(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_averages_to_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=WORLD)
    for tower in TOWERS:
        model = vtoken.apply(tower.model(), PITOME).train()
        loss_of(model(tower.images(batch=4))).backward()
        expected = gradients(model)
        plain, twice, tokens = torch.load(tmp_path / f"{tower.name}.pt")
        assert tokens == tower.tokens
        assert expected.keys() == plain.keys() == twice.keys()
        half = vtoken.apply(tower.model(), PITOME).train()
        loss_of(half(tower.images(batch=4)[:2])).backward()
        apart = [n for n, g in gradients(half).items() if not torch.allclose(g, expected[n], rtol=1e-2)]
        assert len(apart) > 10, "half a batch must not have the gradients of the whole"
        for name, grad in expected.items():
            if float(grad.abs().max()) > 1e-5:  # the key bias has none but rounding errors
                assert_close(f"{tower.name} {name}", grad, plain[name], 1e-5)
                assert_close(f"{tower.name} {name}, checkpointed, accumulated", grad, twice[name], 1e-5)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@every_tower
def test_fsdp2_gradients(tower: Tower, low: bool, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, x = vtoken.apply(tower.model(), PITOME), tower.images()
    plain: Any = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (1,))}
        if low:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for block in model.get_submodule(tower.blocks):
            fully_shard(block, **options)
        fully_shard(model, **options)
        out, trace = vtoken.trace(model, x)
        assert trace.tokens == tower.tokens
        assert trace.size.dtype == torch.float32, "sizes travel beside the tensors that FSDP2 casts"
        assert trace.size.sum(1).tolist() == [float(tower.tokens[0])] * 2
        expected = plain(x)
        assert_close("output", expected, out.float(), 0.1 if low else 1e-6)
        loss_of(out.float()).backward()
        loss_of(expected).backward()
        for name, parameter in model.named_parameters():
            grad = plain.get_parameter(name).grad
            if grad is not None and float(grad.abs().max()) > 1e-5:
                assert_close(name, grad, parameter.grad.full_tensor(), 0.5 if low else 1e-5)
        vtoken.remove(model)
        with torch.no_grad():
            assert_close("removed", tower.model()(x), model(x).float(), 0.1 if low else 1e-6)
    finally:
        dist.destroy_process_group()
