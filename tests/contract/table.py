"""The table of the contract suite: hosts x methods. A new host or method adds a row here, not a file.

What the tests ask of a host goes through the accessors below, which know how the three libraries call things and take
nothing from vtoken but the names of a tower and its blocks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.helpers import ALL_HOSTS, Host
from vtoken.core.host import find_adapter


@dataclass(frozen=True)
class MethodRow:
    """One method.

    Args:
        name: of the row.
        reduces: settings under which every host of the table loses tokens.
        noops: settings under which none does.
        bad: a change of settings that `vtoken.configure` must refuse.
        keeps_mass: whether sizes still sum to the embedded tokens.
        removes: whether it takes tokens away; if not, it thins out attention by a learned part.
        exact: whether its counts are known before the images are; if not, no graph holds them, and the images of a
            batch, which must keep equally many tokens, decide together.
    """

    name: str
    reduces: vtoken.MethodConfig
    noops: tuple[vtoken.MethodConfig, ...]
    bad: dict[str, Any]
    keeps_mass: bool = True
    removes: bool = True
    exact: bool = True

    def serves(self, host: Host) -> bool:
        """Whether the host has what the method acts on."""
        return self.removes or not host.name.startswith(_OTHER_ATTENTION)


# Hosts whose attention vtoken does not put masks into: open_clip's own.
_OTHER_ATTENTION = ("oc_qk_norm",)


def _optional_rows(package: str, module: str) -> list[Host]:
    """The rows of a library that need not be installed."""
    if importlib.util.find_spec(package) is None:
        return []
    rows: list[Host] = importlib.import_module(f"tests.contract.{module}").ROWS
    return rows


HOSTS: list[Host] = [
    *ALL_HOSTS,
    *_optional_rows("open_clip", "open_clip_rows"),
    *_optional_rows("transformers", "hf_rows"),
]
METHODS: list[MethodRow] = [
    MethodRow(
        "pitome",
        vtoken.PiToMe(ratio=0.75),
        (vtoken.PiToMe(ratio=1.0), vtoken.PiToMe(layers=())),
        {"margin": (0.5, 0.5)},
    ),
    MethodRow("tome", vtoken.ToMe(r=9), (vtoken.ToMe(r=0), vtoken.ToMe(r=9, layers=())), {"r": -1}),
    MethodRow(
        "random_merge",
        vtoken.RandomMerge(ratio=0.75, seed=3),
        (vtoken.RandomMerge(ratio=1.0), vtoken.RandomMerge(layers=())),
        {"seed": -1},
    ),
    MethodRow(
        "random_prune",
        vtoken.RandomPrune(ratio=0.75, seed=1),
        (vtoken.RandomPrune(r=0), vtoken.RandomPrune(layers=())),
        {"reduction": "wavg"},
        keeps_mass=False,
    ),
    MethodRow("stride", vtoken.StrideMerge(stride=2, layers=(0, 2)), (vtoken.StrideMerge(layers=()),), {"stride": 1}),
    MethodRow(
        "sparsifiner",
        vtoken.Sparsifiner(keep_ratio=0.3),
        (vtoken.Sparsifiner(keep_ratio=1.0), vtoken.Sparsifiner(layers=())),
        {"num_basis": 3},
        removes=False,
    ),
    MethodRow(
        "threshold_merge",
        vtoken.ThresholdMerge(threshold=0.6),
        (
            vtoken.ThresholdMerge(threshold=0.9999),  # which no pair of the images reaches
            vtoken.ThresholdMerge(threshold=1.0),
            vtoken.ThresholdMerge(layers=()),
        ),
        {"threshold": 1.5},
        exact=False,
    ),
]
PITOME = METHODS[0]
_BY_HOST = {host.name: host for host in HOSTS}
_BY_METHOD = {method.name: method for method in METHODS}

# Structures that differ in what merging touches: prefix, pooling, block, rotation, input handling.
_DISTINCT = (
    "vit_token", "vit_avg_prefix", "vit_map", "distilled", "eva02", "eva_mixed", "eva_dinov3", "naflex_rope",
    "oc_map", "oc_qk_norm", "hf_siglip", "hf_dino_reg", "hf_dino_maps", "hf_dinov3",
)  # fmt: skip
# Of every library one, with average pooling and prefix: where a test runs every method on a few hosts only.
_EVERY_METHOD = ("vit_avg_prefix",)
_SOME_METHODS = ("oc_avg", "hf_dino_reg")


def host(name: str) -> Host:
    """The host row called `name`; the test is skipped if its library is not installed."""
    if name not in _BY_HOST:
        library = {"oc": "open_clip", "hf": "transformers"}[name.partition("_")[0]]
        pytest.importorskip(library)
    return _BY_HOST[name]


def method(name: str) -> MethodRow:
    """The method row called `name`."""
    return _BY_METHOD[name]


def full_table(library: str | None = None) -> pytest.MarkDecorator:
    """All hosts x all methods for timm; other libraries share timm's methods, so there only a few hosts have all."""
    with_all = {h.name for h in HOSTS if h.library == "timm"} | {*_EVERY_METHOD, *_SOME_METHODS}
    return _cases([(h, m) for h in HOSTS for m in METHODS if m is PITOME or h.name in with_all], library)


def every_case(library: str | None = None) -> pytest.MarkDecorator:
    """All hosts with PiToMe, and the other methods on hosts that differ in everything that matters."""
    with_all = {h.name for h in HOSTS if h.library == "timm" and h.name in _DISTINCT} | {*_SOME_METHODS}
    return _cases([(h, m) for h in HOSTS for m in METHODS if m is PITOME or h.name in with_all], library)


def every_host(library: str | None = None, *, exact: bool = False) -> pytest.MarkDecorator:
    """All hosts with PiToMe, and every other method, or `exact` one, on one host with average pooling and prefix."""
    others = [(host(n), m) for n in _EVERY_METHOD for m in METHODS[1:] if m.exact or not exact]
    return _cases([(h, PITOME) for h in HOSTS] + others, library)


def distinct_hosts(library: str | None = None, *, exact: bool = False) -> pytest.MarkDecorator:
    """A few hosts that differ in everything that matters with PiToMe; on one every other method, or `exact` one."""
    others = [(host(n), m) for n in _EVERY_METHOD for m in METHODS[1:] if m.exact or not exact]
    return _cases([(h, PITOME) for h in HOSTS if h.name in _DISTINCT] + others, library)


def slow_but(cases: list[tuple[Host, MethodRow]], *quick: str) -> pytest.MarkDecorator:
    """These hosts and methods, all marked slow but those named "host-method": for what compiles a graph per case."""
    names = [f"{h.name}-{m.name}" for h, m in cases]
    marks = [() if name in quick else (pytest.mark.slow,) for name in names]
    params = [pytest.param(h, m, id=name, marks=mark) for (h, m), name, mark in zip(cases, names, marks, strict=True)]
    return pytest.mark.parametrize(("host", "method"), params)


def installed(*names: str) -> list[str]:
    """Those of the host rows that can be built here."""
    return [n for n in names if n in _BY_HOST]


def _cases(pairs: list[tuple[Host, MethodRow]], library: str | None) -> pytest.MarkDecorator:
    pairs = [(h, m) for h, m in pairs if library in (None, h.library) and m.serves(h)]
    ids = [f"{h.name}-{m.name}" for h, m in pairs]
    return pytest.mark.parametrize(("host", "method"), pairs, ids=ids)


def library_of(model: nn.Module) -> str:
    """The library that a model's class, or one of its bases, comes from."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    return next(name for name in ("timm", "open_clip", "transformers") if name in packages)


def tower(model: Any) -> Any:
    """The module that holds the image blocks; a timm model is its own."""
    library = library_of(model)
    if library == "timm":
        return model
    return getattr(model, "visual", model) if library == "open_clip" else find_adapter(model).tower(model)  # type: ignore[attr-defined]


def blocks(model: nn.Module) -> list[Any]:
    """The blocks in order."""
    return [block for _, block in find_adapter(model).blocks(model)]


def attention(block: Any) -> Any:
    """The attention of a block."""
    return next(getattr(block, name) for name in ("attn", "self_attn", "attention") if hasattr(block, name))


def dimensions(model: nn.Module) -> tuple[int, int]:
    """Width C and number of prefix tokens."""
    spec = find_adapter(model).spec(model)
    return spec.width, spec.num_prefix


def arguments(model: nn.Module, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call the model (or its tower) with, so that it sees the images [B, C, H, W]."""
    if library_of(model) != "transformers":
        return (x,), {}
    config = tower(model).config
    batch, channels, height, width = x.shape
    if config.model_type == "siglip2_vision_model":  # rows of patches, their channels last
        side = config.patch_size
        grid = (height // side, width // side)
        cut = x.reshape(batch, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 3, 5, 1)
        rows = cut.reshape(batch, grid[0] * grid[1], side * side * channels)
        shapes = torch.tensor([grid]).expand(batch, -1)
        return (), {"pixel_values": rows, "pixel_attention_mask": None, "spatial_shapes": shapes}
    fits = (height, width) == (config.image_size, config.image_size) or config.model_type.startswith("dinov")
    return (), {"pixel_values": x} | ({} if fits else {"interpolate_pos_encoding": True})


def forward(model: Any, x: Tensor, **options: Any) -> Any:
    """The model's whole output for images."""
    args, kwargs = arguments(model, x)
    return model(*args, **kwargs, **options)


def main(out: Any) -> Tensor:
    """The one tensor of an output that a user is after: logits, else the pooled features, else the last map."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, tuple):
        return main(out[0])
    found = next(out[key] for key in ("logits", "pooler_output", "feature_maps") if out.get(key) is not None)
    return found if isinstance(found, Tensor) else found[-1]


def call(model: Any, x: Tensor) -> Tensor:
    """The main output for images, with gradients."""
    return main(forward(model, x))


def run(model: nn.Module, x: Any) -> Any:
    """The main output for images, without gradients."""
    with torch.no_grad():
        return call(model, x)


def entries(model: Any) -> dict[str, Callable[[Tensor], Any]]:
    """Every way in which the library hands out something that the blocks computed."""
    bind, inner, library = functools.partial, tower(model), library_of(model)
    if library == "transformers":
        options: dict[str, dict[str, Any]] = {
            "forward": {}, "tuple": {"return_dict": False}, "states": {"output_hidden_states": True},
        }  # fmt: skip
        found = {name: bind(forward, model, **given) for name, given in options.items()}
        return found | {"tower": bind(forward, inner)}
    if library == "open_clip":
        rows = {"normalize_intermediates": True, "output_fmt": "NLC", "output_extra_tokens": True}
        found = {
            "forward": bind(forward, model),
            "maps": inner.forward_intermediates,
            "rows": bind(inner.forward_intermediates, indices=2, **rows),
        }
        if inner is not model:
            found |= {"encode": model.encode_image, "whole maps": model.forward_intermediates}
        return found
    return {
        "logits": model,
        "features": model.forward_features,
        "maps": model.forward_intermediates,
        "rows": bind(model.forward_intermediates, indices=2, output_fmt="NLC", norm=True, intermediates_only=True),
    }


def outputs(model: Any, x: Tensor) -> dict[str, Any]:
    """Everything that the entry methods hand out."""
    with torch.no_grad():
        return {name: entry(x) for name, entry in entries(model).items()}


def signed_methods(model: Any) -> list[Callable[..., Any]]:
    """The entry methods themselves."""
    names = {
        "timm": ("forward", "forward_features", "forward_intermediates", "forward_head"),
        "open_clip": ("forward", "forward_intermediates"),
        "transformers": ("forward",),
    }[library_of(model)]
    owners = [model] if tower(model) is model else [model, tower(model)]
    return [getattr(owner, name) for owner in owners for name in names]


def traced(model: nn.Module, x: Tensor, entry: str = "forward", **options: Any) -> tuple[Any, vtoken.Trace]:
    """Main output, or that of another of timm's entry methods, and its trace, without gradients."""
    with torch.no_grad(), vtoken.tracing(model) as trace:
        out = call(model, x) if entry == "forward" else getattr(model, entry)(x, **options)
    return out, trace


def feature_rows(model: Any, x: Tensor) -> Tensor:
    """Rows [B, T', C] that left the last block, behind the final norm.

    A backbone hands out dense maps only: then one row per patch.
    """
    library = library_of(model)
    if library == "timm":
        return model.forward_features(x)  # type: ignore[no-any-return]
    if library == "open_clip":
        options = {"normalize_intermediates": True, "output_fmt": "NLC", "output_extra_tokens": True}
        out = tower(model).forward_intermediates(x, indices=1, **options)
        return torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], 1)
    out = forward(tower(model), x)
    maps = out.get("feature_maps")
    return out["last_hidden_state"] if maps is None else maps[-1].flatten(2).transpose(1, 2)


def assert_planned(plan: vtoken.Plan, trace: vtoken.Trace) -> None:
    """What was planned happened: the very counts, or some within the bounds."""
    if plan.exact:
        assert tuple(trace.tokens) == plan.tokens == plan.least
    within = [low <= n <= high for low, n, high in zip(plan.least, trace.tokens, plan.tokens, strict=True)]
    assert all(within), (plan.least, trace.tokens, plan.tokens)


def features(model: nn.Module, x: Tensor) -> tuple[Tensor, vtoken.Trace]:
    """`feature_rows` and its trace, without gradients."""
    with torch.no_grad(), vtoken.tracing(model) as trace:
        rows = feature_rows(model, x)
    return rows, trace


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """What lies between the last block and `features`."""
    if library_of(model) == "timm":
        return model.norm  # type: ignore[no-any-return]
    inner = tower(model)
    if library_of(model) == "open_clip":
        return inner.ln_post  # type: ignore[no-any-return]
    if inner.config.model_type == "clip_vision_model":  # hands its rows out unnormed
        return nn.Identity()
    return next(getattr(inner, name) for name in ("post_layernorm", "layernorm", "norm") if hasattr(inner, name))


def layer_rows(model: Any, x: Tensor) -> tuple[list[Tensor], vtoken.Trace]:
    """Unnormed rows [B, T_l, C] after every block, prefix first, and the trace; for a backbone [B, T0, C]."""
    library = library_of(model)
    with torch.no_grad(), vtoken.tracing(model) as trace:
        if library == "transformers":
            return list(forward(model, x, output_hidden_states=True)["hidden_states"][1:]), trace
        if library == "open_clip":
            out = tower(model).forward_intermediates(x, output_fmt="NLC", output_extra_tokens=True)
            pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
            return [torch.cat(pair, 1) for pair in pairs], trace
        prefix = model.num_prefix_tokens > 0
        out = model.forward_intermediates(
            x, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=prefix
        )  # fmt: skip
        return [torch.cat(pair[::-1], 1) for pair in out] if prefix else list(out), trace


def layer_maps(model: Any, x: Tensor) -> tuple[list[Tensor], vtoken.Trace]:
    """Dense maps [B, C, H, W] after every block and the trace; none from hosts that make no maps.

    A backbone's have gone through its final norm, the others not.
    """
    library = library_of(model)
    with torch.no_grad(), vtoken.tracing(model) as trace:
        if library == "timm":
            return list(model.forward_intermediates(x, intermediates_only=True)), trace
        if library == "open_clip":
            return list(tower(model).forward_intermediates(x)["image_intermediates"]), trace
        return list(forward(model, x).get("feature_maps") or []), trace


def checkpointing_(model: Any) -> None:
    """Turn activation checkpointing on, in the library's own way."""
    if library_of(model) == "transformers":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        model.set_grad_checkpointing(True)


def dense(rows: Tensor, dest: Tensor) -> Tensor:
    """Merged rows [B, T', C] at every embedded row [B, T0]; a plain loop, on purpose not vtoken's."""
    return torch.stack([torch.stack([rows[b, int(g)] for g in dest[b]]) for b in range(rows.shape[0])])


def snapshot(model: nn.Module) -> list[tuple[str, int, dict[str, int], list[int]]]:
    """Identity of everything that patching could touch: class, instance attributes and hooks of every module."""
    return [
        (name, id(type(m)), {k: id(v) for k, v in m.__dict__.items()}, [*m._forward_hooks, *m._forward_pre_hooks])
        for name, m in model.named_modules()
    ]
