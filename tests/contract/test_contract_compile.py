"""Compiling, exporting, ONNX: the patched model stays one graph (docs/mechanism.md 8, docs/methods/pitome.md 14)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.contract.table import METHODS, MethodRow, arguments, call, installed, main, slow_but
from tests.contract.table import host as host_row
from tests.contract.table import method as method_row
from tests.helpers import Host, assert_close, vit
from vtoken.core import patch
from vtoken.core.bound import BoundBlocks

_HOSTS = ("vit_token", "vit_avg_prefix", "vit_map", "vit_prr_token", "eva02", "eva_mixed", "naflex_rope")
_OTHERS = installed("oc_map", "hf_siglip", "hf_dino_reg")
_CASES = [(host_row(n), method_row("pitome")) for n in (*_HOSTS, *_OTHERS)]
_CASES += [(host_row("vit_avg_prefix"), m) for m in METHODS[1:] if m.exact]
_cases = slow_but(_CASES, "vit_avg_prefix-pitome", "vit_avg_prefix-sparsifiner", "eva02-pitome", "hf_siglip-pitome")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs = 0
        self._compile: Callable[..., Any] = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self._compile(graph, inputs)


def _call_like(other: Any, model: Any, x: Tensor) -> Tensor:
    """The main output of a module that is called as `model` is."""
    args, kwargs = arguments(model, x)
    return main(other(*args, **kwargs))


@_cases
def test_one_full_graph_serves_repeated_calls_and_any_batch(host: Host, method: MethodRow) -> None:
    model = vtoken.apply(host.model(), method.reduces)
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch, seed in ((3, 0), (3, 1), (5, 2), (2, 3)):
            x = host.images(batch=batch, seed=seed)
            torch._dynamo.mark_dynamic(x, 0)
            assert_close(f"batch {batch}", call(model, x), _call_like(compiled, model, x), 1e-5)
    assert backend.graphs == 1


def test_static_shapes_compile_once() -> None:
    host = host_row("vit_avg_prefix")
    model = vtoken.apply(host.model(), method_row("pitome").reduces)
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        for seed in range(3):
            x = host.images(seed=seed)
            assert_close("compiled", model(x), compiled(x), 1e-5)
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["vit_avg_prefix", "hf_siglip"])
def test_the_form_for_compilers_that_do_not_list_dicts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_GRAPHS_KNOW_DICTS", False)  # as on torch 2.11, on which all tests here run by it
    host = host_row(name)
    model = host.model()
    before = {module: list(module.__dict__) for module in model.modules()}
    vtoken.apply(model, method_row("pitome").reduces)
    assert any("_vtoken_names" in module.__dict__ for module in model.modules())
    compiled = torch.compile(model, fullgraph=True, backend=Counting())
    with torch.no_grad():
        x = host.images()
        assert_close("compiled", call(model, x), _call_like(compiled, model, x), 1e-5)
    vtoken.remove(model)
    # torch leaves a mark of its own on what it compiled
    after = {m: [entry for entry in m.__dict__ if entry != "_is_torch_compile"] for m in model.modules()}
    assert after == before


def test_bound_blocks_are_true_before_they_are_filled_and_false_if_empty() -> None:
    # torch 2.11's compiler asks the truth of an object that it has made and not yet filled.
    assert BoundBlocks.__new__(BoundBlocks)
    assert not BoundBlocks(nn.Sequential(), [], [])
    assert BoundBlocks(nn.Sequential(), [nn.Identity()], [nn.Identity()])


@pytest.mark.parametrize("name", ["vit_avg_prefix", "eva02"])
def test_training_compiles(name: str) -> None:
    host = host_row(name)
    model, x = (
        vtoken.apply(host.model(dtype=torch.float64), method_row("pitome").reduces),
        host.images(dtype=torch.float64),
    )
    model.train()
    backend = Counting()
    compiled, grads = torch.compile(model, fullgraph=True, backend=backend), []
    for each in (model, compiled, compiled):
        model.zero_grad()
        each(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for n, grad in grads[0].items():
        if float(grad.abs().max()) > 1e-9:
            assert_close(n, grad, grads[1][n], 1e-9)
            assert_close(n, grads[1][n], grads[2][n], 1e-12)
    assert backend.graphs == 1


def test_checkpointed_training_compiles() -> None:
    host = host_row("vit_avg_prefix")
    model, x = (
        vtoken.apply(host.model(dtype=torch.float64), method_row("pitome").reduces),
        host.images(dtype=torch.float64),
    )
    model.train()
    model(x).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    for n, p in model.named_parameters():
        if n in plain and float(plain[n].abs().max()) > 1e-9:
            assert_close(n, plain[n], p.grad, 1e-9)


def test_other_settings_recompile_to_their_own_graph() -> None:
    host = host_row("vit_token")
    model, x = vtoken.apply(host.model(), vtoken.PiToMe(ratio=0.75)), host.images()
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for count, ratio in ((1, 0.75), (2, 0.6)):
            vtoken.configure(model, ratio=ratio)
            assert_close(f"ratio {ratio}", model(x), compiled(x), 1e-5)
            assert backend.graphs == count
        vtoken.remove(model)
        assert_close("removed", model(x), compiled(x), 1e-5)


@pytest.mark.slow
def test_inductor() -> None:
    model = vtoken.apply(Host("tiny", lambda: vit(depth=2, global_pool="avg")).model(), method_row("pitome").reduces)
    x = host_row("vit_token").images()
    with torch.no_grad():
        assert_close("inductor", model(x), torch.compile(model, fullgraph=True)(x), 1e-4)


@_cases
def test_export_and_reload_with_any_batch(host: Host, method: MethodRow) -> None:
    model, x = vtoken.apply(host.model(), method.reduces), host.images(batch=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    args, kwargs = arguments(model, x)
    shapes: Any = ({0: batch},) if args else {name: {0: batch} for name in kwargs}
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert not any(node.target.__module__.startswith("vtoken") for node in program.graph.nodes if callable(node.target))
    with torch.no_grad():
        for count in (3, 2, 7):
            images = host.images(batch=count, seed=count)
            assert_close(f"batch {count}", call(model, images), _call_like(loaded, model, images), 1e-5)


def _sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort in ONNX's own terms: TopK puts the lower index first among equals."""
    from onnxscript import opset18 as op

    length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


@slow_but(
    [(host_row("vit_token"), method_row("pitome")), (host_row("vit_avg_prefix"), method_row("tome")),
     *((host_row(n), method_row("pitome")) for n in ("eva02", *installed("hf_dino_reg")))],
    "vit_avg_prefix-tome",
)  # fmt: skip
def test_onnx(host: Host, method: MethodRow) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = vtoken.apply(host.model(), method.reduces), host.images()
    # torch's exporter knows no stable sort (torch 2.15, onnxscript 0.7); users pass the same table.
    table = {torch.ops.aten.sort.stable: _sort_stable}
    args, kwargs = arguments(model, x)
    program = torch.onnx.export(
        model, args, kwargs=kwargs, dynamo=True, verbose=False, custom_translation_table=table
    )  # fmt: skip
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    assert {o.domain for o in program.model_proto.opset_import} == {""}, "no custom operators"
    with torch.no_grad():
        for seed in (0, 1):
            images = host.images(seed=seed)
            found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
            assert_close("onnxruntime", call(model, images), torch.from_numpy(found), 1e-4)


def test_compiled_and_traced_modules_are_refused() -> None:
    host = host_row("vit_token")
    model, x = host.model(), host.images()
    for wrapped in (torch.compile(model, backend="eager"), torch.jit.trace(host.model(), x, check_trace=False)):
        with pytest.raises(vtoken.VTokenError, match="appl"):
            vtoken.apply(wrapped, vtoken.PiToMe())
    assert not vtoken.is_applied(model)


def test_torchscript_trace_of_a_patched_model() -> None:
    host = host_row("vit_token")
    model, x = vtoken.apply(host.model(), method_row("pitome").reduces), host.images()
    traced = torch.jit.trace(model, x, check_trace=False)
    y = host.images(seed=4)
    with torch.no_grad():
        assert_close("traced", model(y), traced(y), 1e-5)
