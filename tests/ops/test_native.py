"""The C functions of kernels/native against the torch form of the same ops, and where they must stay away."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from vtoken.errors import VTokenError
from vtoken.ops import MergePlan, explain, key_metric, plan_pitome, plan_tome
from vtoken.ops.merging import native

pytestmark = pytest.mark.skipif(
    explain("plan_tome", torch.rand(1, 9, 4)).backend != "native", reason="not compiled, or no AVX2, or kernels forced"
)
PLANNERS: dict[str, Callable[..., MergePlan]] = {
    "tome": lambda m, r, p, b: plan_tome(m, r, num_prefix=p, backend=b),
    "pitome": lambda m, r, p, b: plan_pitome(m, r, margin=0.3, num_prefix=p, backend=b),
    "pitome, nobody close": lambda m, r, p, b: plan_pitome(m, r, margin=1.0, num_prefix=p, backend=b),
    "pitome, all close": lambda m, r, p, b: plan_pitome(m, r, margin=-1.0, alpha=0.5, num_prefix=p, backend=b),
    "pairs": lambda m, r, p, b: plan_pitome(m, r, margin=0.3, variant="pitome_pairs", num_prefix=p, backend=b),
}
each_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=list(PLANNERS))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def copies(seed: int) -> Tensor:
    """A metric [3, 37, 8]: behind one prefix token, as many of each of 8 kinds as its number; kinds are orthogonal.

    Similarities are 0 or 1 in any order of addition (those that torch makes of equal rows may differ otherwise), those
    of a kind tie, and no two kinds do.
    """
    kinds = torch.arange(1, 9).repeat_interleave(torch.arange(1, 9)) - 1
    mixed = [kinds[torch.randperm(36, generator=torch.Generator().manual_seed(seed + i))] for i in range(3)]
    return torch.cat([torch.ones(3, 1, 8), torch.nn.functional.one_hot(torch.stack(mixed), 8).float()], dim=1)


def same(found: MergePlan, expected: MergePlan) -> bool:
    parts = [(found.keep, expected.keep), (found.src, expected.src), (found.slot, expected.slot)]
    return all(torch.equal(a, b) for a, b in parts) and found.num_dest == expected.num_dest


@each_planner
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_plans_are_those_of_torch(planner: Callable[..., MergePlan], prefix: int) -> None:
    # few tokens, so that no two energies are closer than rounding; widths and counts around a vector's and a block's
    for seed, num_tokens in enumerate([7, 12, 13, 16, 17, 31, 32, 33, 40]):
        for width in (3, 8, 16, 21, 64):
            metric = draw(100 * seed + width, 2, num_tokens + prefix, width)
            for r in (1, num_tokens // 4, num_tokens // 2):
                found = planner(metric, r, prefix, "auto")
                assert same(found, planner(metric, r, prefix, "torch")), (num_tokens, width, r)


@each_planner
def test_ties_go_to_the_first(planner: Callable[..., MergePlan]) -> None:
    for seed in range(20):
        metric = copies(seed)
        assert same(planner(metric, 13, 1, "auto"), planner(metric, 13, 1, "torch"))
    equal = torch.full((1, 90, 24), 0.3)
    assert same(planner(equal, 20, 1, "auto"), planner(equal, 20, 1, "torch"))
    assert same(planner(0 * equal, 20, 1, "auto"), planner(0 * equal, 20, 1, "torch"))


def test_equal_tokens_have_equal_energies_wherever_they_stand() -> None:
    # Copies of a group of tokens, mixed: were any two copies' energies apart, their order would not be that of rows.
    for seed in range(8):
        group = draw(seed, 1, 14, 64)
        copies = torch.randperm(14 * 14, generator=torch.Generator().manual_seed(seed)) % 14
        plan = plan_pitome(group[:, copies], 60, margin=0.4)
        order = torch.stack([plan.src, plan.keep[:, -60:]], dim=2).flatten()
        for kind in copies.unique():
            rows = order[copies[order] == kind]
            assert torch.equal(rows, rows.sort()[0])


@each_planner
def test_plans_choose_as_in_double_precision_but_for_near_ties(planner: Callable[..., MergePlan]) -> None:
    differ = 0
    for seed in range(30):
        metric = draw(seed, 1, 197, 64) + draw(seed + 1000, 1, 1, 64)
        kept = set(planner(metric, 19, 1, "auto").keep[0].tolist())
        differ += kept != set(planner(metric.double(), 19, 1, "torch").keep[0].tolist())
    assert differ <= 2


@pytest.mark.parametrize("most", ["avx2", "none"])
def test_older_processors_choose_the_same(most: str) -> None:
    code = (
        "import torch, vtoken.ops as o\n"
        "m = torch.randn(2, 34, 24, generator=torch.Generator().manual_seed(5))\n"
        "print(o.explain('plan_tome', m).backend, o.explain('apply', m).backend)\n"
        "for p in (o.plan_tome(m, 9, num_prefix=1), o.plan_pitome(m, 9, margin=0.3, num_prefix=1)):\n"
        "    y = p.apply(m)[0]\n"
        "    print(p.keep.tolist(), p.src.tolist(), p.slot.tolist(), y.tolist())\n"
    )
    outputs = {
        instructions: subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env=os.environ | {"VTOKEN_TEST_NATIVE": instructions},
        ).stdout.splitlines()
        for instructions in (most, "")
    }  # fmt: skip
    assert outputs[most][0] == ("native native" if most == "avx2" else "torch native")
    assert outputs[""][0] == "native native"
    assert outputs[most][1:] == outputs[""][1:]


def test_rows_are_the_bits_of_torch() -> None:
    for seed in range(10):
        x, size = draw(seed, 3, 50, 18), torch.randint(1, 9, (3, 50)).float()
        for planner in PLANNERS.values():
            plan = planner(draw(seed + 50, 3, 50, 8), 20, 2, "auto")
            for given in (None, size, size.unsqueeze(2), size.long()):
                rows, new_size = plan.apply(x, given)
                expected, expected_size = plan.apply(x, given, backend="torch")
                assert torch.equal(rows, expected)
                assert torch.equal(new_size, expected_size)
                assert new_size.dtype == torch.float32
            assert torch.equal(x, draw(seed, 3, 50, 18))  # never written to


def test_tensors_may_be_views() -> None:
    qkv = draw(3, 2, 33, 3 * 4 * 16)
    keys = qkv.reshape(2, 33, 3, 4, 16).permute(2, 0, 3, 1, 4)[1]
    torch.testing.assert_close(key_metric(keys), key_metric(keys, backend="torch"))
    metric, x = qkv[:, :, 10:34], qkv[:, :, 40:]
    for planner in PLANNERS.values():
        plan = planner(metric, 6, 1, "auto")
        assert same(plan, planner(metric.clone(), 6, 1, "torch"))
        assert torch.equal(plan.apply(x)[0], plan.apply(x.clone(), backend="torch")[0])
    expanded = draw(4, 1, 33, 8).expand(3, -1, -1)
    assert same(plan_tome(expanded, 5), plan_tome(expanded, 5, backend="torch"))
    transposed = draw(5, 2, 8, 33).transpose(1, 2)  # channels lie apart, which is torch's
    assert explain("plan_tome", transposed).backend == "torch"
    assert plan_tome(transposed, 5).removed == 5


def test_plans_that_name_missing_rows_raise() -> None:
    plan = plan_tome(draw(0, 1, 20, 8), 4)
    assert plan.rows is not None
    for tensor, wrong in ((plan.rows, 20), (plan.rows, -1), (plan.slot, 16), (plan.slot, -1)):
        kept = tensor[0, 0].clone()
        tensor[0, 0] = wrong
        with pytest.raises(IndexError):
            plan.apply(draw(1, 1, 20, 8))
        tensor[0, 0] = kept
    plan.apply(draw(1, 1, 20, 8))


@pytest.mark.parametrize("part", ["rows", "slot"])
def test_plans_of_other_whole_numbers_or_shapes_are_torchs(part: str) -> None:
    rows, slot = torch.arange(20).repeat(3, 1), torch.full((3, 4), 15)
    plan = MergePlan.laid_out(rows.int() if part == "rows" else rows, slot.int() if part == "slot" else slot, 4)
    x = draw(0, 3, 20, 8)
    assert torch.equal(plan.apply(x)[0], MergePlan.laid_out(rows, slot, 4).apply(x)[0])
    with pytest.raises(RuntimeError):  # slots of one image for three, behind which C would read
        MergePlan.laid_out(rows, slot[:1].clone(), 4).apply(x)


def test_sizes_that_are_no_numbers_in_memory_are_torchs() -> None:
    plan, x = plan_tome(draw(0, 1, 20, 8), 4), draw(1, 1, 20, 8)
    with pytest.raises(RuntimeError, match="meta"):
        plan.apply(x, torch.full((1, 20), 3.0, device="meta"))
    sizes = TwoTensor(torch.full((1, 20), 3.0), torch.full((1, 20), 3.0))
    assert torch.equal(plan.apply(x, sizes)[1].a, 3 * plan.apply(x)[1])
    with FakeTensorMode():
        size, imagined = torch.ones(1, 20), plan_tome(torch.randn(1, 20, 8), 4)
    for one, given in ((plan, size), (imagined, None)):
        with pytest.raises(AssertionError, match="FakeTensor"):
            one.apply(x, given)


@pytest.mark.parametrize("base", [vtoken.ToMe, vtoken.PiToMe])
def test_methods_that_ask_for_more_than_half_are_told(base: type[Any]) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Greedy(base):
        method = "greedy"

        def removed(self, amount: Any, mergeable: int) -> int:
            return mergeable * 3 // 4

    model = vtoken.apply(timm.create_model("test_vit").eval(), Greedy(r=4))
    with pytest.raises(VTokenError, match="`removed` said 75"):
        model(torch.randn(1, 3, 160, 160))


def test_c_refuses_numbers_that_lead_outside() -> None:
    x, rows, slot = draw(0, 1, 20, 8), torch.empty(1, 20, dtype=torch.int64), torch.empty(1, 15, dtype=torch.int64)
    for num_prefix, r in ((0, 11), (21, 0), (19, 1), (-1, 1), (0, -1)):
        arguments = (x.data_ptr(), 1, 20, 8, 160, 8, num_prefix, r, rows.data_ptr(), slot.data_ptr())
        with pytest.raises(ValueError, match="more rows"):
            native.native.tome(*arguments)
        with pytest.raises(ValueError, match="more rows"):
            native.native.pitome(*arguments, True, 0.5, 1.0)
    for call in (native.native.tome, native.native.pitome, native.native.merge, native.native.sum_heads):
        with pytest.raises(TypeError, match="got 0"):
            call()


def test_rows_keep_their_bits_where_the_compiler_may_fuse(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "build_ext", "--build-lib",
         str(tmp_path)], cwd=root, env=os.environ | {"CFLAGS": "-march=native"}, capture_output=True, text=True,
    )  # fmt: skip
    library = next(tmp_path.glob("vtoken_kernels/native*"), None)
    if library is None:
        pytest.skip(f"no compiler that takes -march=native: {built.stderr}")
    spec = importlib.util.spec_from_file_location("vtoken_kernels.native", library)
    assert spec is not None
    assert spec.loader is not None
    fused = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "native", fused)
        test_rows_are_the_bits_of_torch()


class _Sub(Tensor):
    pass


class _Watcher(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _dual() -> Any:
    with forward_ad.dual_level():
        yield


REFUSED: dict[str, tuple[Tensor, Callable[[], AbstractContextManager[Any]]]] = {
    "half": (draw(0, 1, 20, 8).bfloat16(), contextlib.nullcontext),
    "double": (draw(0, 1, 20, 8).double(), contextlib.nullcontext),
    "empty": (draw(0, 0, 20, 8), contextlib.nullcontext),
    "meta": (torch.empty(1, 20, 8, device="meta"), contextlib.nullcontext),
    "subclass": (draw(0, 1, 20, 8).as_subclass(_Sub), contextlib.nullcontext),
    "negated": (torch._neg_view(draw(0, 1, 20, 8)), contextlib.nullcontext),
    "imaginary": (torch.view_as_complex(draw(0, 1, 20, 2)).conj().imag.unsqueeze(2), contextlib.nullcontext),
    "zeros that are only noted": (torch._efficientzerotensor(1, 20, 8), contextlib.nullcontext),
    "a watcher": (draw(0, 1, 20, 8), _Watcher),
    "a counter": (draw(0, 1, 20, 8), lambda: FlopCounterMode(display=False)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_c_does_not_read(name: str) -> None:
    x, around = REFUSED[name]
    with around():
        assert explain("plan_tome", x).backend == explain("apply", x).backend == "torch"
        assert native.lacks(x)
        plan = plan_tome(x, 3)
        rows = plan.apply(x)[0]
    if x.device.type == "cpu" and x.numel():
        assert torch.equal(rows, plan.apply(x, backend="torch")[0])


@pytest.mark.parametrize("early", [False, True])
def test_graphs_of_make_fx_hold_what_they_do(early: bool) -> None:
    x, other = draw(0, 1, 20, 8), draw(1, 1, 20, 8)

    def merged(x: Tensor) -> Tensor:
        plan = plan_pitome(key_metric(x.unsqueeze(1)), 4, margin=0.2)
        return plan.apply(x)[0]

    assert torch.equal(make_fx(merged, pre_dispatch=early)(x)(other), merged(other))


def test_transforms_gradients_and_counters_see_torchs_operators() -> None:
    plan, x = plan_tome(draw(0, 1, 20, 8), 3), draw(1, 1, 20, 8)
    several = draw(2, 4, 1, 20, 8)
    torch.testing.assert_close(vmap(lambda one: plan.apply(one)[0])(several), plan_tome(
        draw(0, 1, 20, 8).expand(4, -1, -1), 3).apply(several[:, 0])[0].unsqueeze(1))  # fmt: skip
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(plan.apply(forward_ad.make_dual(x, x))[0]).tangent is not None
    needed = x.clone().requires_grad_()
    plan.apply(needed)[0].sum().backward()
    assert needed.grad is not None
    with torch.no_grad():
        assert explain("apply", needed).backend == "native"
    assert explain("plan_tome", needed).backend == "native"  # plans have no gradient
    with FlopCounterMode(display=False) as counter:
        plan_tome(draw(0, 1, 20, 8), 3)
    assert counter.get_total_flops() == 2 * 10 * 10 * 8


def test_variants_that_stay_with_torch() -> None:
    x = draw(0, 1, 20, 8)
    for options in ({"variant": "text"}, {"energy": "eq4"}, {"protect": [3]}):
        assert "C functions have no" in explain("plan_pitome", x, **options).reason
        plan = plan_pitome(x, 4, margin=0.2, **options)  # type: ignore[arg-type]
        assert same(plan, plan_pitome(x, 4, margin=0.2, backend="torch", **options))  # type: ignore[arg-type]
    assert explain("apply", x, reduction="amax").backend == "torch"


def test_a_library_of_another_system_is_left_out(tmp_path: Path) -> None:
    ours = Path(native.native.__file__)
    (tmp_path / "vtoken_kernels").mkdir()
    (tmp_path / "vtoken_kernels" / "__init__.py").touch()
    (tmp_path / "vtoken_kernels" / ours.name).write_bytes(b"\xcf\xfa\xed\xfe" * 64)
    code = "import torch, vtoken.ops as o; print(o.explain('plan_tome', torch.rand(1, 9, 4)))"
    path = os.pathsep.join([str(tmp_path), str(Path(vtoken.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.stdout.startswith("torch: vtoken's C functions do not load"), run.stderr


def test_several_threads_share_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = torch.rand(4, 197, 64), torch.rand(1, 197, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert explain("plan_tome", large).reason == "torch shares so much among its threads"
    assert explain("plan_tome", small).backend == "native"
    assert explain("apply", torch.rand(8, 197, 768)).reason == "torch shares so much among its threads"
    assert explain("apply", large).backend == "native"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert explain("plan_tome", large).backend == "native"


@pytest.mark.parametrize("method", ["pitome", "tome"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_gives_what_it_gives_without(method: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = vtoken.apply(timm.create_model("test_vit").eval(), method, r=8)
    x = torch.randn(batch, 3, 160, 160)
    used = []
    for name in ("sum_heads", "merge", method):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, real=real, name=name: used.append(name) or real(*args))
    with torch.inference_mode():
        found = model(x)
        assert len(used) == 3 * 6
        monkeypatch.setattr(native, "MISSING", "left out")
        torch.testing.assert_close(found, model(x))
    assert len(used) == 3 * 6


def test_training_takes_the_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vtoken.apply(timm.create_model("test_vit"), "tome", r=8)
    x = torch.randn(2, 3, 160, 160)
    used = []
    for name in ("merge", "tome"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, real=real, name=name: used.append(name) or real(*args))
    model(x).sum().backward()
    assert used == ["tome"] * 6
    weight = next(m for m in model.modules() if isinstance(m, nn.Linear)).weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_the_stub_names_what_the_module_has() -> None:
    import vtoken_kernels

    stub = ast.parse((Path(vtoken_kernels.__file__).parent / "native.pyi").read_text())
    functions = {each.name: len(each.args.posonlyargs) for each in stub.body if isinstance(each, ast.FunctionDef)}
    public = {name for name in dir(native.native) if not name.startswith("_")}
    assert public == {"INSTRUCTIONS", *functions}
    for name, count in functions.items():
        with pytest.raises(TypeError, match=f"takes {count} numbers, got 1"):
            getattr(native.native, name)(0)
