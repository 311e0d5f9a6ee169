"""`vtoken.compile`: one graph of one block for all layers, whatever ratio, margin, batch and image size."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.contract.table import METHODS, MethodRow, call, installed, slow_but
from tests.contract.table import host as host_row
from tests.contract.table import method as method_row
from tests.contract.test_contract_compile import Counting
from tests.helpers import Host, assert_close, vit

_HOSTS = ("vit_token", "vit_avg_prefix", "vit_map", "eva02", "eva_mixed", "naflex_rope", "distilled")
_OTHERS = installed("oc_avg", "oc_map", "oc_qk_norm", "hf_siglip", "hf_dino_reg")
_CASES = [(host_row(n), method_row("pitome")) for n in (*_HOSTS, *_OTHERS)]
_CASES += [(host_row("vit_avg_prefix"), m) for m in METHODS[1:] if m.removes and m.exact]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _two(host: Host, config: vtoken.MethodConfig, backend: Any = "eager") -> tuple[Any, Any]:
    """The same patched model twice, eager and compiled."""
    eager, compiled = vtoken.apply(host.model(), config), vtoken.apply(host.model(), config)
    return eager, vtoken.compile(compiled, backend=backend)


@slow_but(_CASES, "vit_avg_prefix-pitome", "oc_avg-pitome", "hf_siglip-pitome")
def test_the_graph_computes_what_the_eager_model_computes(host: Host, method: MethodRow) -> None:
    eager, compiled = _two(host, method.reduces)
    x = host.images(batch=3)
    with torch.no_grad():
        assert_close(host.name, call(eager, x), call(compiled, x), 1e-5)
        before, after = vtoken.trace(eager, x)[1], vtoken.trace(compiled, x)[1]
    assert before.tokens == after.tokens
    assert before.dest is not None
    assert after.dest is not None
    assert torch.equal(before.dest, after.dest)


@dataclass(frozen=True, kw_only=True)
class OneLess(vtoken.ScheduledMergeConfig):
    """Merges one token less than it says."""

    def match(
        self, layer: int, depth: int, metric: Tensor, r: int, num_prefix: int, protect: Tensor | None
    ) -> vtoken.ops.MergePlan:
        return vtoken.ops.plan_tome(metric, r - 1, num_prefix=num_prefix)


def test_a_wrong_count_is_an_error_in_the_graph_too() -> None:
    eager, compiled = _two(host_row("vit_token"), OneLess(r=5))
    x = host_row("vit_token").images()
    for model in (eager, compiled):
        with torch.no_grad(), pytest.raises(vtoken.VTokenError, match=r"block 0.*vtoken.plan would be wrong"):
            model(x)


def _relu(block: Any) -> None:
    block.mlp.act = torch.nn.ReLU()


def _double_norm(block: Any) -> None:
    block.norm2.weight.data.mul_(2)


def _eps(block: Any) -> None:
    block.norm1.eps = 0.5


def _no_bias(block: Any) -> None:
    block.attn.proj.bias = None


def _scale(block: Any) -> None:
    block.attn.scale = 0.01
    block.attn.fused_attn = False


@pytest.mark.parametrize("change", [_relu, _double_norm, _eps, _no_bias, _scale])
def test_what_changes_inside_one_block_is_seen_by_its_next_call(change: Any) -> None:
    """The graph asks less than torch would; never less than what a block is."""
    eager, compiled = _two(host_row("vit_token"), vtoken.ToMe(r=3))
    x = host_row("vit_token").images(batch=2)
    with torch.no_grad():
        before = compiled(x)
        assert_close("before", eager(x), before, 1e-5)
        for model in (eager, compiled):
            change(model.blocks[1])
        assert_close("after", eager(x), compiled(x), 1e-5)
        assert not torch.allclose(compiled(x), before)


def _sweep(model: Any, backend: Counting, changes: list[dict[str, Any]]) -> list[int]:
    found = []
    for change in changes:
        size, batch = change.pop("size", 56), change.pop("batch", 2)
        vtoken.configure(model, **change)
        with torch.no_grad():
            model(torch.randn(batch, 3, size, size))
        found.append(backend.graphs)
    return found


def test_one_graph_serves_every_ratio_margin_batch_and_size() -> None:
    backend = Counting("eager")
    model = vtoken.apply(vit(depth=4, img_size=56, dynamic_img_size=True).eval(), vtoken.PiToMe(ratio=0.9))
    vtoken.compile(model, backend=backend)
    changes: list[dict[str, Any]] = [
        {}, {"ratio": 0.8}, {"r": 5}, {"r": [7, 6, 5, 4]}, {"margin": 0.3}, {"margin": [0.9, 0.4, 0.2, 0.1]},
        {"margin_schedule": "constant", "margin": 0.7}, {"alpha": 0.5}, {"alpha": 0.0},
        {"batch": 5}, {"size": 112}, {"batch": 3, "size": 84},
    ]  # fmt: skip
    assert _sweep(model, backend, changes) == [1] * len(changes)
    # What the docstring says has a graph of its own.
    assert _sweep(model, backend, [{"batch": 1}, {"batch": 1, "r": 4}, {"r": [4, 1, 0, 4]}]) == [2, 2, 4]


def test_the_numbers_of_a_graph_are_those_of_its_settings() -> None:
    eager, compiled = _two(host_row("vit_token"), vtoken.PiToMe(ratio=0.75))
    x = host_row("vit_token").images(batch=2)
    with torch.no_grad():
        before = compiled(x)
        for change in (
            {"margin": 0.1}, {"alpha": 0.25}, {"alpha": 0.0, "margin": -0.2}, {"energy": "eq4", "alpha": 3.0},
        ):  # fmt: skip
            for model in (eager, compiled):
                vtoken.configure(model, **change)
            assert_close(str(change), eager(x), compiled(x), 1e-5)
        assert not torch.allclose(compiled(x), before)


def test_a_call_of_the_graph_makes_no_tensor_of_a_constant_and_asks_for_no_hook() -> None:
    """Each would cost microseconds in each block at each call."""
    graphs: list[torch.fx.GraphModule] = []
    asked: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    def keep(guards: Any) -> list[bool]:
        asked.extend(g.name for g in guards if g.guard_type != "EMPTY_NN_MODULE_HOOKS_DICT")  # which torch skips
        return [True] * len(guards)

    model = vtoken.apply(host_row("vit_token").model(), vtoken.PiToMe(ratio=0.75, alpha=0.5))
    vtoken.compile(model, backend=backend, options={"guard_filter_fn": keep})
    with torch.no_grad():
        model(host_row("vit_token").images())
    numbers = [
        n.name for n in graphs[0].graph.nodes
        if n.op == "placeholder" and isinstance(n.meta["example_value"], Tensor) and n.meta["example_value"].dim() == 0
    ]  # fmt: skip
    assert [n for n in numbers if not n.startswith("l_block")] == ["l_settings_margin_", "l_settings_alpha_"]
    assert asked
    assert not [name for name in asked if name.startswith("block") and "_hooks" in name]


@pytest.mark.slow
def test_models_do_not_share_graphs_or_use_up_each_others_limit() -> None:
    for width in range(1, 10):  # torch's limit is eight graphs
        backend = Counting("eager")
        model = vtoken.apply(vit(depth=2, embed_dim=16 * width, num_heads=2).eval(), vtoken.ToMe(r=4))
        with torch.no_grad():
            vtoken.compile(model, backend=backend)(host_row("vit_token").images())
        assert backend.graphs == 1


def test_gradients() -> None:
    """Also of a model that ran in inference mode before, whose tensors autograd refuses."""
    host = host_row("vit_avg_prefix")
    x, grads = host.images(dtype=torch.float64), []
    config = method_row("pitome").reduces
    for compile_it in (False, True):
        model = vtoken.apply(host.model(dtype=torch.float64), config).train()
        if compile_it:
            vtoken.compile(model, backend="aot_eager")
            with torch.inference_mode():
                model(x)
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(name, grad, grads[1][name], 1e-8)


@pytest.mark.slow
def test_stochastic_depth_trains_beyond_torchs_limit_of_graphs() -> None:
    model = vtoken.apply(vit(depth=9, drop_path_rate=0.2).train(), vtoken.ToMe(r=2))
    vtoken.compile(model, backend="eager")(host_row("vit_token").images()).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.slow
def test_inductor() -> None:
    host = Host("tiny", lambda: vit(depth=3, global_pool="avg"))
    eager, compiled = _two(host, method_row("pitome").reduces, "inductor")
    x = host_row("vit_token").images()
    with torch.no_grad():
        assert_close("inductor", call(eager, x), call(compiled, x), 1e-4)


def test_it_goes_with_the_patch_and_copies_compile_anew() -> None:
    host = host_row("vit_token")
    stock, x = host.model(), host.images()
    model = vtoken.compile(vtoken.apply(host.model(), vtoken.ToMe(r=4)), backend="eager")
    keys = list(stock.state_dict())
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        merged = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), merged)
        vtoken.remove(model)
        assert torch.equal(model(x), stock(x))
    assert not any(name.startswith("_vtoken") for m in model.modules() for name in vars(m))


def test_inside_a_larger_graph_the_blocks_are_part_of_it() -> None:
    host, backend = host_row("vit_token"), Counting("eager")
    eager, compiled = _two(host, vtoken.PiToMe(ratio=0.75))
    x = host.images()
    with torch.no_grad():
        whole = torch.compile(compiled, fullgraph=True, backend=backend)
        assert_close("whole", eager(x), whole(x), 1e-5)
        program = torch.export.export(compiled, (x,)).module()
        assert_close("exported", eager(x), program(x), 1e-5)
    assert backend.graphs == 1


def test_a_hook_on_an_identity_is_part_of_a_larger_graph() -> None:
    eager, compiled = _two(host_row("vit_token"), vtoken.PiToMe(ratio=0.75))
    x = host_row("vit_token").images()
    with torch.no_grad():
        plain = eager(x)
        for model in (eager, compiled):
            for name in ("ls1", "attn.k_norm", "drop_path2"):
                model.blocks[1].get_submodule(name).register_forward_hook(lambda m, i, out: out * 2)
        whole = torch.compile(compiled, fullgraph=True, backend="eager")
        assert_close("whole", eager(x), whole(x), 1e-5)
        assert not torch.allclose(whole(x), plain)


def test_features_and_unmerging() -> None:
    host = host_row("vit_avg_prefix")
    eager, compiled = _two(host, vtoken.PiToMe(ratio=0.75))
    x = host.images()
    with torch.no_grad():
        assert_close("features", eager.forward_features(x), compiled.forward_features(x), 1e-5)
        maps: list[tuple[Tensor, Tensor]] = list(
            zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (eager, compiled)), strict=True)
        )
    for one, other in maps:
        assert_close("map", one, other, 1e-5)


@pytest.mark.parametrize("part", ["mlp", "attn", "norm1", "mlp.fc1", "attn.qkv", "ls1", "attn.k_norm", ""])
def test_hooks_on_parts_are_called_for_their_own_block_and_may_change_what_it_gives(part: str) -> None:
    host = host_row("vit_token")
    eager, compiled = _two(host, vtoken.PiToMe(ratio=0.75))
    x, seen = host.images(), []
    with torch.no_grad():
        plain = compiled(x)  # one block's graph serves another from now on
        handles = []
        for model in (eager, compiled):
            module = model.blocks[1].get_submodule(part)
            handles.append(module.register_forward_hook(lambda m, i, out: (seen.append(m), out * 2)[1]))
        assert_close("hooked", eager(x), compiled(x), 1e-5)
        assert [m is compiled.blocks[1].get_submodule(part) for m in seen] == [False, True]
        for handle in handles:
            handle.remove()
        assert torch.equal(compiled(x), plain)
    assert len(seen) == 2


def test_global_hooks_are_called_with_every_module() -> None:
    host = host_row("vit_token")
    eager, compiled = _two(host, vtoken.PiToMe(ratio=0.75))
    x, counts = host.images(), []
    with torch.no_grad():
        for model in (eager, compiled):
            model(x)
            names, seen = {m: n for n, m in model.named_modules()}, []
            handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o, s=seen: s.append(m))
            model(x)
            handle.remove()
            counts.append([names[m] for m in seen])
    assert counts[0] == counts[1]


def test_what_cannot_be_compiled_so_is_refused() -> None:
    model = host_row("vit_token").model()
    with pytest.raises(vtoken.VTokenError, match=r"vtoken\.apply"):
        vtoken.compile(model)
    vtoken.apply(model, vtoken.Sparsifiner(keep_ratio=0.5))
    with pytest.raises(vtoken.ConfigError, match=r"torch\.compile\(model\)"):
        vtoken.compile(model)
    vtoken.apply(model, vtoken.ToMe(r=4), replace=True)
    for wrong in ({"fullgraph": False}, {"dynamic": False}, {"backends": "eager"}):
        with pytest.raises(vtoken.ConfigError, match=next(iter(wrong))):
            vtoken.compile(model, **wrong)
    assert not any(m._vtoken.compiled for m in model.modules() if "_vtoken" in vars(m))
