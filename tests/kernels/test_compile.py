"""Every kernel compiles for sm_80, sm_90 and gfx942 within their limits, through its operator, without a GPU.

Shows that kernels parse, type-check, assemble and fit. Not that they are right or fast.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtoken_kernels import launch, library

if launch.INTERPRETED:
    pytest.skip("this process interprets kernels", allow_module_level=True)

from tests.kernels.compiling import SHARED_LIMIT, TARGETS, Compiled, compiling_for, inspect

FOLDER = Path(launch.__file__).parent
HALF = torch.bfloat16


def kernels_in_the_folder() -> set[str]:
    """Names of all functions that are launched: @triton.jit and ending in _kernel."""
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found.add(node.name)
    return {name for name in found if name.endswith("_kernel")}


def call_plans() -> None:
    """The matching, for keys of a float32 and of a half-precision model, and for wide metrics."""
    library.sum_heads(torch.zeros(2, 50, 3, 4, 64, dtype=HALF)[:, :, 1].transpose(1, 2))
    guard = torch.zeros(2, 49, dtype=torch.bool)
    library.plan_pitome(torch.zeros(2, 50, 64), guard, 9, 1, 0.5, 1.0, False, False)
    library.plan_pitome(torch.zeros(2, 50, 64, dtype=HALF), None, 9, 1, 0.5, 1.0, True, True)
    library.plan_pitome(torch.zeros(2, 50, 768), None, 9, 1, 0.5, 1.0, False, False)
    library.plan_tome(torch.zeros(2, 50, 80), 9, 1)
    library.plan_tome(torch.zeros(2, 50, 768, dtype=HALF), 9, 1)


def call_merges() -> None:
    """Rows of ViT-B and of ViT-H, every reduction."""
    keep, src, dest = (torch.zeros(2, n, dtype=torch.int64) for n in (41, 9, 50))
    start, member = library.group_sources(src, src, 41, 9)
    size, new_size = torch.ones(2, 50), torch.ones(2, 41)
    for width, dtype in ((768, HALF), (1280, torch.float32)):
        x, y, grad = (torch.zeros(2, n, width, dtype=dtype) for n in (50, 50, 41))
        for reduction in ("wavg", "mean", "amax", "prune"):
            library.merge(x, size, keep, dest, start, member, reduction)
            if reduction != "amax":
                library.merge_bwd(grad, size, new_size, keep, dest, start, member, reduction)
        library.merge_amax_bwd(grad, x, keep, start, member)
        library.add_merge_norm(x, y, None, keep, dest, start, member, x[0, 0], x[0, 0], 1e-6)


def call_attention() -> None:
    """Forward and backward on views of a fused qkv; heads of 72 are padded to 128."""
    for head_dim, dtype in ((64, HALF), (128, HALF), (72, HALF), (64, torch.float32), (128, torch.float32)):
        q, k, v = torch.zeros(2, 50, 3, 2, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        bias: Tensor | None = None if head_dim == 72 else torch.zeros(2, 50)
        out, lse = library.attention(q, k, v, bias, 0.1)
        library.attention_bwd(out, q, k, v, bias, out, lse, 0.1)


def call_selection() -> None:
    """Lists by every way that makes them; 96 basis vectors are multiplied in steps."""
    order, limit = torch.zeros(1, 70, dtype=torch.int32), torch.zeros(2)
    for width in (32, 96):
        # Coefficients as the predictor leaves them.
        coefficients, basis = torch.zeros(2, 2, width, 70).transpose(2, 3), torch.zeros(width, 71)
        library.select_lists(coefficients, basis, order, None, 9)
    library.select_lists(coefficients, basis, order, limit, 9)
    library.select_rows(torch.zeros(2, 2, 70, 32), torch.zeros(2, 32, 71), 9)
    library.connect_lists(torch.zeros(2, 2, 70, 9, dtype=torch.int64), None, 70, 71, 1)
    library.connect_lists(torch.zeros(50, dtype=torch.int64), torch.zeros(2, 2, 71, dtype=torch.int64), 70, 71, 1)


def call_sparse_attention() -> None:
    """Forward and backward along lists with words and along those of groups, with and without sizes."""
    index, order = torch.zeros(2, 2, 2, 71, dtype=torch.int32), torch.zeros(1, 70, dtype=torch.int32)
    words, groups = (index, index.long(), index[..., :3].contiguous()), (index, None, None)
    bias = torch.zeros(2, 71)
    for head_dim, dtype, given, key_bias in (
        (64, HALF, words, None), (64, HALF, groups, bias), (128, HALF, words, bias), (128, HALF, groups, None),
        (72, HALF, words, bias), (64, torch.float32, words, bias), (128, torch.float32, words, bias),
    ):  # fmt: skip
        q, k, v = torch.zeros(2, 71, 3, 2, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        out, lse = library.sparse_attention(q, k, v, key_bias, order, *given, 1, 64, 9, 0.1)
        library.sparse_attention_bwd(out, q, k, v, key_bias, order, *given, out, lse, 1, 64, 9, 0.1)


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "sm_80" else (pytest.mark.slow,)) for name in TARGETS]
)
def test_every_kernel_compiles_within_the_limits(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with compiling_for(target, monkeypatch) as seen:
        call_plans()
        call_merges()
        call_attention()
        call_selection()
        call_sparse_attention()
    found = [inspect(kernel, target, compiled, tmp_path) for kernel, compiled in seen]
    for one in found:
        print(*one)
        assert_fits(one)
    assert {one.kernel for one in found} == kernels_in_the_folder()


def assert_fits(one: Compiled) -> None:
    assert one.shared <= SHARED_LIMIT[one.target], one
    assert one.spills == 0, one
    assert one.has_dot == one.has_matrix_instruction, f"{one}: products must run on matrix units"


def test_kernels_depend_on_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "vtoken_kernels", *sys.stdlib_module_names}
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path.name} imports {names}"
    assert len(list(FOLDER.glob("*.py"))) > 10


def test_the_check_sees_what_it_looks_for() -> None:
    # Products are made in nine kernels and nowhere else, so has_dot is no empty claim.
    with_dot = {
        node.name
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        and any(word in ast.unparse(node) for word in ("tl.dot", "similarity(", "_scores("))
    }  # fmt: skip
    assert with_dot == {
        "energy_kernel", "match_kernel", "attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel",
        "select_kernel", "sparse_attention_fwd_kernel", "sparse_attention_bwd_dq_kernel",
        "sparse_attention_bwd_dkv_kernel",
    }  # fmt: skip
    assert with_dot < kernels_in_the_folder()
    bad = Compiled("k", "gfx942", 65 * 1024, 10, 0, False, False)
    for change in ({}, {"shared": 0, "spills": 8}, {"shared": 0, "has_dot": True}):
        with pytest.raises(AssertionError):
            assert_fits(bad._replace(**change))
    assert_fits(bad._replace(shared=64 * 1024))
