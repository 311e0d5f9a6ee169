"""What is given is checked when it is given: every setting of every method, every argument of `vtoken.ops` and `nn`.

The tables are walked along the signatures, so that a new setting or argument without a line here, and without a check,
fails.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from vtoken import checks, nn, ops
from vtoken.core.config import example
from vtoken.ops.sparse.attention import attention_map
from vtoken.ops.sparse.hilbert import hilbert_order
from vtoken.ops.sparse.resize import resize_rows

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
Q = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(1))
COEFFICIENTS = torch.rand(2, 2, 11, 5, generator=torch.Generator().manual_seed(2))
BASIS = torch.rand(5, 12, generator=torch.Generator().manual_seed(3))
CONNECTIONS = ops.select_topk(COEFFICIENTS, BASIS, 0.5)
PLAN = ops.plan_tome(X, 3)
MERGE = nn.MergeTokens(vtoken.PiToMe())

#: Values that are no number of any kind.
NO_NUMBER: list[Any] = [
    True, False, np.True_, math.nan, math.inf, -math.inf, np.float64("nan"), "no", "1", b"1", {}, [1.0, "x"], object(),
    1j, torch.ones(2, 2), 10**400,
]  # fmt: skip
WHOLE = [*NO_NUMBER[:-1], 0.5, 2.5, np.float32(0.5), Fraction(1, 2), [0.5]]
WORDS: list[Any] = ["zzz", "", 3, True, 0.5, ("zzz",), ["zzz"], {}, b"auto", np.array(["a", "b"]), torch.ones(2)]
FLAGS: list[Any] = ["no", "yes", "False", 0, 1, 3, 0.0, np.True_, [], [True], torch.tensor(True), math.nan]
TENSORS: list[Any] = ["no", 3, 0.5, True, [[1.0]], np.ones((2, 12, 8)), {}, torch.ones(()), torch.ones(3, 3, 3, 3, 3)]
#: Kind of an argument -> values that it cannot be.
WRONG: dict[str, list[Any]] = {
    "whole": WHOLE,  # of any sign
    "from 0": [*WHOLE, -1, np.int64(-1)],
    "from 1": [*WHOLE, -1, 0],
    "from 2": [*WHOLE, -1, 0, 1],
    "number": NO_NUMBER,
    "not negative": [*NO_NUMBER, -0.5, -1],
    "positive": [*NO_NUMBER, -1, 0],
    "at least 1": [*NO_NUMBER, -1, 0, 0.5],
    "rate": [*NO_NUMBER, -0.1, 1.1],
    "cosine": [*NO_NUMBER, -1.5, 1.01],
    "share": [*NO_NUMBER, 0, -0.5, 1.5, 2],
    "sign": [*NO_NUMBER, 0, 2, -2, 0.5],
    "word": WORDS,
    "flag": FLAGS,
    "tensor": TENSORS,
    "wholes": ["no", 0.5, True, math.nan, [0.5], [True], ["1"], [np.True_], [math.inf], {}, [[1]], [None]],
    "patches": ["no", 0.5, True, math.nan, [0.5], [True], [-1], ["1"], {}, [[1]], [None]],
    "grid": ["no", 3, 0.5, (3,), (3, 4, 5), (0, 4), (3, -4), (3, 4.5), (True, 12), ("3", 4), [None, 4], {}],
    "amount": [*NO_NUMBER, -1, [-1]],
    "object": ["no", 3, True, 0.5, {}, torch.ones(2)],
}
#: What an argument of this name is, wherever it is given; another kind somewhere is in the table of that owner.
KINDS = {
    "ratio": "amount", "r": "amount", "margin": "cosine", "alpha": "not negative", "margin_schedule": "word",
    "variant": "word", "energy": "word", "metric": "word", "reduction": "word", "place": "word", "order": "word",
    "prop_attn": "flag", "layers": "wholes", "protect": "patches", "seed": "from 0", "stride": "from 2",
    "keep_ratio": "share", "mode": "word", "query_group": "from 1", "num_basis": "from 1", "reduce_c_factor": "from 1",
    "reduce_n_factor": "from 1", "share_proj": "flag", "basis_abs": "flag", "coef_topk": "from 0",
    "coef_threshold": "not negative", "basis_threshold": "not negative", "scale": "number", "score_threshold": "number",
    "token_keep_ratio": "share", "prune_after": "wholes", "phase": "word", "backend": "word", "num_tokens": "from 1",
    "start_layer": "whole", "ensemble": "word", "scorer": "word", "newline": "word", "positions": "word",
    "num_prefix": "from 0", "budget": "from 1", "min_tokens": "from 0", "max_tokens": "from 1", "power": "not negative",
    "rounding": "word", "t": "from 0", "height": "from 1", "width": "from 1", "shape": "word", "eps": "not negative",
    "dropout_p": "rate", "group_size": "from 1", "grid": "grid", "num_original": "from 1", "k": "tensor",
    "q": "tensor", "v": "tensor", "x": "tensor", "branch": "tensor", "size": "tensor", "weight": "tensor",
    "bias": "tensor", "keys": "tensor", "coefficients": "tensor", "basis": "tensor", "scores": "tensor",
    "key_bias": "mask", "attn_mask": "mask", "live": "tensor", "plan": "object", "connections": "object",
    "dtype": "object", "op": "word", "threshold": "number", "head_dim": "from 1", "num_heads": "from 1",
    "layer": "from 0", "depth": "from 1", "dim": "from 1", "merge": "object", "mlp_ratio": "positive",
    "dropout": "rate", "config": "object", "qkv_bias": "flag", "rows": "from 1", "columns": "from 1", "old": "grid",
    "new": "grid", "mean": "flag", "block": "from 1", "top_fraction": "share", "temperature": "positive",
    "warmup_steps": "not negative", "teacher_scale": "share", "momentum": "rate", "total_steps": "at least 1",
    "simclr_weight": "not negative", "byol_weight": "not negative", "hidden_dim": "from 1", "out_dim": "from 1",
    "head_norm": "word", "ema_text": "flag", "freeze_patch_embed": "flag", "outside": "word", "space": "word",
    "contextual": "from 0", "relevance_sign": "sign", "count_separators": "flag", "vision_chunk": "from 1",
}  # fmt: skip
_METRIC = {"metric": "tensor"}
#: What is called, arguments that it takes, and kinds that differ from those above. Arguments of torch are torch's.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = {
    "allocate_tokens": (ops.allocate_tokens, {"scores": [0.5, 0.2], "budget": 9}, {"scores": "scores"}),
    "attention_with_bias": (ops.attention_with_bias, {"q": Q, "k": Q, "v": Q, "bias": torch.zeros(2, 1, 1, 12)}, {}),
    "attention_with_sizes": (ops.attention_with_sizes, {"q": Q, "k": Q, "v": Q, "size": torch.ones(2, 12)}, {}),
    "explain": (ops.explain, {"op": "plan_tome", "tensors": (X,)}, {"tensors": "", "options": ""}),
    "add_merge_norm": (ops.add_merge_norm, {"plan": PLAN, "x": X, "branch": X}, {}),
    "key_metric": (ops.key_metric, {"keys": Q}, {}),
    "plan_pitome": (ops.plan_pitome, {"metric": X, "r": 3, "margin": 0.5}, _METRIC | {"r": "from 0"}),
    "plan_random": (ops.plan_random, {"metric": X, "r": 3}, _METRIC | {"r": "from 0", "seed": "whole"}),
    "plan_stride": (ops.plan_stride, {"metric": X, "stride": 2}, _METRIC | {"stride": "from 1"}),
    "plan_threshold": (
        ops.plan_threshold, {"metric": X, "r": 3, "threshold": 0.5}, _METRIC | {"r": "from 0", "threshold": "cosine"},
    ),
    "plan_tome": (ops.plan_tome, {"metric": X, "r": 3}, _METRIC | {"r": "from 0"}),
    "row_widths": (ops.row_widths, {"t": 9, "height": 4, "width": 5}, {}),
    "select_grouped": (
        ops.select_grouped,
        {"coefficients": COEFFICIENTS, "basis": BASIS, "keep_ratio": 0.5, "grid": (1, 11)}, {},
    ),
    "select_threshold": (ops.select_threshold, {"coefficients": COEFFICIENTS, "basis": BASIS, "threshold": 0.5}, {}),
    "select_tokens": (ops.select_tokens, {"scores": torch.rand(2, 9), "k": 3}, {"k": "from 1"}),
    "select_topk": (ops.select_topk, {"coefficients": COEFFICIENTS, "basis": BASIS, "keep_ratio": 0.5}, {}),
    "size_bias": (ops.size_bias, {"size": torch.ones(2, 12), "dtype": torch.float32}, {}),
    "sparse_attention": (
        ops.sparse_attention, {"q": Q, "k": Q, "v": Q, "connections": CONNECTIONS, "scale": 0.5}, {},
    ),
    "attention_map": (attention_map, {"q": Q, "k": Q, "connections": CONNECTIONS, "scale": 0.5}, {}),
    "hilbert_order": (hilbert_order, {"rows": 3, "columns": 4}, {"device": ""}),
    "resize_rows": (
        resize_rows, {"rows": torch.ones(13, 2), "old": (3, 4), "new": (2, 2), "num_prefix": 1, "mean": True},
        {"rows": "tensor"},
    ),
    "MergePlan.apply": (PLAN.apply, {"x": X}, {}),
    "MergePlan.unmerge": (PLAN.unmerge, {"y": X[:, :9]}, {"y": "tensor"}),
    "MergePlan.then": (PLAN.then, {"next_plan": ops.plan_tome(X[:, :9], 2)}, {"next_plan": "object"}),
    "MergePlan.identity": (
        ops.MergePlan.identity, {"batch": 2, "num_tokens": 3, "device": torch.device("cpu")},
        {"batch": "from 0", "num_tokens": "from 0", "device": ""},
    ),
    "Connections": (
        ops.Connections, {"num_tokens": 12, "index": CONNECTIONS.index},
        dict.fromkeys(("index", "order", "crow", "col"), "not a tensor"),
    ),
    "ConnectivityPredictor": (
        nn.ConnectivityPredictor, {"head_dim": 8, "num_heads": 2, "num_tokens": 12}, {"device": "", "dtype": ""},
    ),
    "MergeBlock": (nn.MergeBlock, {"dim": 8, "num_heads": 2, "merge": MERGE}, {}),
    "MergeTokens": (nn.MergeTokens, {"config": vtoken.PiToMe()}, {}),
    "SparseAttention": (nn.SparseAttention, {"dim": 8, "num_heads": 2, "grid": (3, 4)}, {}),
    "MergeTokens.forward": (MERGE.forward, {"x": X, "metric": X}, _METRIC),
    "MergeBlock.forward": (nn.MergeBlock(8, 2, MERGE).forward, {"x": X}, {}),
}  # fmt: skip
WRONG["mask"] = [value for value in TENSORS if not isinstance(value, torch.Tensor) or value.dim() > 0]
WRONG["scores"] = ["no", 3, True, {}, [], [math.nan], [-1.0], ["a"], [None], torch.ones(2, 2), torch.ones(())]
WRONG["tokens or share"] = [*NO_NUMBER[:-1], 0, -1, 0.0, 1.5, np.float32(1.5), np.int64(0), [0.5, True], [3, -1]]
WRONG["not a tensor"] = ["no", 3, 0.5, True, [[1]], np.ones((2, 2)), {}]
#: Public, and neither a function with arguments of its own nor in the table: results; and what reads attention.
RESULTS = {"Assigned", "Choice", "MergePlan"}
ELSEWHERE = {"assign", "class_row", "cls_scores", "ensemble", "projected_class_row", "received_row", "scored_layers"}


def cases_of(owner: str, call: Callable[..., Any], kinds: dict[str, str]) -> list[Any]:
    found = []
    for name, parameter in inspect.signature(call).parameters.items():
        kind = kinds.get(name, KINDS.get(name, "missing"))
        assert kind != "missing", f"{owner}({name}=...): say in tests/test_checks.py what it is, and check it"
        wrong = WRONG[kind] if kind else []
        if kind and parameter.default is not None and "None" not in str(parameter.annotation):
            wrong = [*wrong, None]
        found += [pytest.param(owner, name, value, id=f"{owner}-{name}-{i}") for i, value in enumerate(wrong)]
    return found


CONFIGS = {name: example(name) for name in vtoken.methods() if type(example(name)).__module__.startswith("vtoken.")}
OWN = {"quota": {"budget": "tokens or share"}}
SETTINGS = [case for name, config in CONFIGS.items() for case in cases_of(name, type(config), OWN.get(name, {}))]
ARGUMENTS = [case for owner, (call, _, kinds) in CALLS.items() for case in cases_of(owner, call, kinds)]


def test_everything_public_is_in_the_table() -> None:
    functions = {name for name in ops.__all__ if callable(getattr(ops, name))}
    assert functions - RESULTS - ELSEWHERE <= set(CALLS)
    assert set(nn.__all__) <= set(CALLS)
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize(("owner", "name", "value"), SETTINGS)
def test_settings_refuse_what_means_nothing(owner: str, name: str, value: Any) -> None:
    if owner == "random_prune" and name == "reduction":
        value = "mean"
    config = CONFIGS[owner]
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.default is None}
    if name == "r":
        given.pop("ratio", None)
    if owner == "vtc_cls" and name == "keep_ratio":
        given.pop("num_tokens")
    with pytest.raises(vtoken.VTokenError, match=name):
        type(config)(**given | {name: value})


@pytest.mark.parametrize(("owner", "name", "value"), ARGUMENTS)
def test_arguments_refuse_what_means_nothing(owner: str, name: str, value: Any) -> None:
    call, given, _ = CALLS[owner]
    with pytest.raises(vtoken.VTokenError):
        call(**given | {name: value})


@pytest.mark.parametrize("owner", CALLS)
def test_the_table_calls_what_works(owner: str) -> None:
    call, given, _ = CALLS[owner]
    if "tensors" in given:
        assert call(given["op"], *given["tensors"]) == call(given["op"], *given["tensors"])
        return
    call(**given)
    # numpy's numbers are numbers.
    asked = {k: np.int64(v) if type(v) is int else np.float32(v) if type(v) is float else v for k, v in given.items()}
    call(**asked)


@pytest.mark.parametrize("owner", CONFIGS)
def test_numbers_of_numpy_are_settings(owner: str) -> None:
    config = CONFIGS[owner]
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {k: v for k, v in plain.items() if type(v) in (int, float)}
    kept = {k: v for k, v in plain.items() if k not in ("ratio",)} | {k: 0.5 for k in plain if k == "ratio"}
    asked = {k: np.int64(v) if type(v) is int else np.float64(v) for k, v in kept.items()}
    made = type(config)(**asked)
    assert made == type(config)(**kept)
    assert vtoken.config_from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert all(type(getattr(made, name)) in (int, float) for name in asked)


def test_a_setting_that_does_not_count_is_checked_all_the_same() -> None:
    # Where nothing is removed, and where another setting decides.
    for backend in ("cuda", None, 3):
        for call in (ops.plan_tome, lambda *a, **k: ops.plan_pitome(*a, margin=0.5, **k)):
            with pytest.raises(vtoken.ConfigError, match="backend"):
                call(X, 0, backend=backend)
        with pytest.raises(vtoken.ConfigError, match="backend"):
            ops.MergePlan.identity(2, 12, X.device).apply(X, backend=backend)
    with pytest.raises(vtoken.ConfigError, match="energy"):
        ops.plan_pitome(X, 0, margin=0.5, variant="tome", energy="x")


@pytest.mark.parametrize("protect", [[0.5], [True], ["1"], torch.tensor([0.5]), [12], [-1], torch.tensor([12]),
                                     torch.tensor([-1]), torch.tensor([[True]]), "no", 0.5])  # fmt: skip
def test_protect_names_rows(protect: Any) -> None:
    with pytest.raises(vtoken.VTokenError, match="protect"):
        ops.plan_pitome(X, 3, margin=0.5, protect=protect)


def test_what_cannot_be_registered_or_read() -> None:
    for wrong in (3, "pitome", vtoken.PiToMe(), int, None):
        with pytest.raises(vtoken.ConfigError, match="subclass"):
            vtoken.register_method(wrong)
    for values in (3, None, "pitome", [("method", "pitome")]):
        with pytest.raises(vtoken.ConfigError, match="dict"):
            vtoken.config_from_dict(values)
    for method in (3, None, ["pitome"], {}):
        with pytest.raises(vtoken.ConfigError, match="unknown method"):
            vtoken.config_from_dict({"method": method, "version": 1})


# --- the checks themselves ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(-50, 50), st.none() | st.integers(-40, 40), st.none() | st.integers(-40, 40))
def test_whole(value: int, least: int | None, most: int | None) -> None:
    inside = (least is None or value >= least) and (most is None or value <= most)
    for form in (value, np.int64(value), np.int8(value)):
        if inside:
            found = checks.whole("f", "n", form, least, most)
            assert found == value
            assert type(found) is int
        else:
            with pytest.raises(vtoken.ConfigError, match=r"f\(n=.*\): must be a whole number"):
                checks.whole("f", "n", form, least, most)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.floats() | st.integers(-3, 3) | st.just(10**400),
    st.sampled_from([None, -1.0, 0.0]),
    st.sampled_from([None, 1.0]),
    st.booleans(),
)
def test_number(value: float, low: float | None, high: float | None, closed: bool) -> None:
    bounds = {"least": low, "most": high} if closed else {"above": low, "below": high}
    inside = abs(value) < 10**399 and math.isfinite(value)
    inside = inside and (low is None or value > low or (closed and value == low))
    inside = inside and (high is None or value < high or (closed and value == high))
    if inside:
        found = checks.number("f", "n", value, **bounds)
        assert found == float(value)
        assert type(found) is float
    else:
        with pytest.raises(vtoken.ConfigError, match=r"^f\(n=.*\): must be .*(finite|in )"):
            checks.number("f", "n", value, **bounds)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 1000))
def test_share_of_is_the_ceiling_of_the_decimal(count: int, thousandths: int) -> None:
    exact = math.ceil(Fraction(thousandths, 1000) * count)
    assert checks.share_of(thousandths / 1000, count) == max(1, exact)


def test_a_bare_message_says_what_was_found_and_what_is_right() -> None:
    with pytest.raises(vtoken.ConfigError) as caught:
        ops.plan_stride(X, 2.5)
    assert str(caught.value) == (
        "plan_stride(stride=2.5): every stride-th token is kept, so it must be a whole number from 1 on"
    )
    with pytest.raises(vtoken.ConfigError, match=r"MergeBlock\(num_heads=0\): must be a whole number from 1 on"):
        nn.MergeBlock(8, 0, MERGE)
    with pytest.raises(vtoken.ConfigError, match=r"Sparsifiner\(basis_abs='no'\): must be True or False"):
        vtoken.Sparsifiner(basis_abs="no")
    with pytest.raises(
        vtoken.InputError, match=r"plan_tome\(metric=...\): must be a torch.Tensor \[B, T, d\].*got ndarray"
    ):
        ops.plan_tome(np.ones((2, 4, 3)), 1)


def test_unmerge_takes_features_of_the_forward_and_its_trace() -> None:
    model = vtoken.apply(timm.create_model("test_vit", img_size=64, num_classes=2).eval(), vtoken.PiToMe(ratio=0.8))
    with torch.no_grad(), vtoken.tracing(model) as trace:
        features = model.forward_features(torch.randn(2, 3, 64, 64))
    assert torch.equal(vtoken.unmerge(features, trace), vtoken.unmerge(features, trace, layer=np.int64(-1)))
    for wrong in ("no", 3, None, features.numpy(), features[0], features[:1], features[:, 1:]):
        with pytest.raises(vtoken.InputError, match="features"):
            vtoken.unmerge(wrong, trace)
    for wrong in ("no", None, features, model):
        with pytest.raises(vtoken.InputError, match=r"must be a vtoken\.Trace"):
            vtoken.unmerge(features, wrong)
    depth = len(trace.layer_dest)
    for wrong in (depth, -depth - 1, 0.5, True, "1"):
        with pytest.raises(vtoken.ConfigError, match="layer"):
            vtoken.unmerge(features, trace, layer=wrong)
    with pytest.raises(vtoken.ConfigError, match="did you mean 'mask'"), vtoken.tracing(model, maps="masks"):
        pass


@pytest.mark.parametrize("scores", [torch.zeros(0, 5), torch.zeros(2, 0), torch.zeros(0)])
def test_nothing_to_select_from(scores: torch.Tensor) -> None:
    found = vtoken.select_tokens(scores, 3)
    assert found.shape == (*scores.shape[:-1], min(3, scores.shape[-1]))
    assert found.dtype == torch.int64
    for wrong in (torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64)):
        with pytest.raises(vtoken.InputError, match="real numbers"):
            vtoken.select_tokens(wrong, 1)
