"""torch.export, ONNX and torch.compile with a batch that varies."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.ecosystem.towers import PITOME, Tower, every_tower
from tests.helpers import assert_close


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@every_tower
def test_exported_program_takes_any_batch(tower: Tower) -> None:
    model = vtoken.apply(tower.model(), PITOME)
    program = torch.export.export(model, (tower.images(batch=3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for batch in (3, 1, 7):
            x = tower.images(batch=batch, seed=batch)
            assert_close(f"batch {batch}", model(x), loaded(x), 1e-5)
        assert float((loaded(x) - vtoken.remove(model)(x)).norm()) > 1e-3, "nothing was merged"


def sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """A stable sort in ONNX's own terms: TopK puts the lower index first among equals."""
    from onnxscript import opset18 as op

    length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


@pytest.mark.slow
@every_tower
def test_onnx_takes_any_batch(tower: Tower) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = vtoken.apply(tower.model(), PITOME)
    program = torch.onnx.export(
        model,
        (tower.images(batch=3),),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.aten.sort.stable: sort_stable},
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    assert {o.domain for o in program.model_proto.opset_import} == {""}, "no custom operators"
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    [entry] = session.get_inputs()
    assert not isinstance(entry.shape[0], int)
    with torch.no_grad():
        for batch in (1, 2, 3, 5):
            x = tower.images(batch=batch, seed=batch)
            [found] = session.run(None, {entry.name: x.numpy()})
            assert_close(f"batch {batch}", model(x), torch.from_numpy(found), 1e-4)
        assert float((torch.from_numpy(found) - vtoken.remove(model)(x)).norm()) > 1e-3, "nothing was merged"


class Counting:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.graphs = 0
        self._compile: Any = torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self._compile(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@every_tower
def test_one_graph_for_batches_marked_dynamic(tower: Tower, train: bool) -> None:
    model, backend = vtoken.apply(tower.model(), PITOME).train(train), Counting("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(train):
        for batch in (2, 3, 5):
            x = tower.images(batch=batch, seed=batch)
            torch._dynamo.mark_dynamic(x, 0)
            out = compiled(x)
            assert_close(f"batch {batch}", model(x), out, 1e-5)
            if train:
                out.square().sum().backward()
            torch.compiler.set_stance("fail_on_recompile")
    assert backend.graphs == 1


@pytest.mark.slow
@every_tower
def test_dynamic_true_compiles_once(tower: Tower) -> None:
    """It makes symbols of the image's sides too; an open_clip tower once took four minutes here."""
    model, backend = vtoken.apply(tower.model(), PITOME), Counting("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = tower.images(batch=batch, seed=batch)
            assert_close(f"batch {batch}", model(x), compiled(x), 1e-5)
            torch.compiler.set_stance("fail_on_recompile")
    assert backend.graphs == 1
