"""Every timm architecture that vtoken claims: built on meta, its measures and its plan checked against a forward."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vtoken
from vtoken.core.host import find_adapter
from vtoken.hosts.names import build_weightless, why_not

pytestmark = pytest.mark.names

# docs/methods/pitome.md 11: architectures by file of timm 1.0.31, and how many of them can lose tokens.
_FILES = {
    "vision_transformer": 154,
    "deit": 16,
    "eva": 65,
    "naflexvit": 14,
    "vitamin": 13,
    "vision_transformer_hybrid": 14,
}
_CONFIG = vtoken.PiToMe(ratio=0.9)


def build(name: str) -> Any:
    """The architecture without weights."""
    return build_weightless(name).eval()


def structure(model: Any) -> tuple[Any, ...]:
    """What merging touches: classes, pooling, prefix, position, and switches inside block and attention."""
    block, rope = model.blocks[0], getattr(model, "rope", None)
    attn = block.attn
    return (
        type(model), type(block), type(attn), type(block.mlp), type(getattr(model, "attn_pool", None)),
        vtoken.core.host.find_adapter(model).spec(model).pooling, model.num_prefix_tokens, type(rope),
        getattr(model, "rope_mixed", False), type(attn.k_norm), type(attn.norm), attn.qkv is None,
        getattr(model, "pos_embed", None) is None,
    )  # fmt: skip


@functools.cache
def surveyed() -> tuple[dict[str, str | None], dict[tuple[Any, ...], list[str]]]:
    """Why each name is not supported (None if it is), and the supported names by structure."""
    reasons: dict[str, str | None] = {}
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for file in _FILES:
        for name in timm.list_models(module=file):
            model = build(name)
            try:
                check_spec(name, model)
            except vtoken.UnsupportedModelError as refusal:
                reasons[name] = str(refusal)
                assert type(model).__name__ in reasons[name], name
                assert "The model was left as it was" in reasons[name], name
                continue
            reasons[name] = None
            kinds.setdefault(structure(model), []).append(name)
    return reasons, kinds


def check_spec(name: str, model: Any) -> None:
    """The measures that methods see are those of the modules."""
    adapter = find_adapter(model)
    spec = adapter.spec(model)
    assert spec.name == type(model).__name__, name
    assert spec.depth == len(model.blocks) == len(adapter.blocks(model)), name
    assert spec.width == model.embed_dim == model.num_features, name
    assert spec.num_heads == model.blocks[0].attn.num_heads, name
    assert spec.num_prefix == model.num_prefix_tokens, name
    embed = getattr(model, "patch_embed", None)
    if embed is not None:
        assert spec.grid == tuple(embed.grid_size), name
        assert adapter.image_size(model) == tuple(embed.img_size), name
    assert spec.position == ("absolute" if getattr(model, "rope", None) is None else "rotary"), name
    plan = vtoken.plan(model, _CONFIG)
    assert plan.tokens[0] == spec.num_prefix + spec.grid[0] * spec.grid[1], name
    assert len(plan.tokens) == spec.depth + 1, name
    assert all(a > b or a <= spec.num_prefix + 9 for a, b in zip(plan.tokens, plan.tokens[1:], strict=False)), name


def test_supported_names_are_those_of_the_specification() -> None:
    reasons, _ = surveyed()
    counts = {file: sum(reasons[n] is None for n in timm.list_models(module=file)) for file in _FILES}
    if timm.__version__ == "1.0.31":
        assert counts == _FILES
    for name in ("vit_base_patch16_224", "vit_small_patch16_18x2_224", "swin_tiny_patch4_window7_224"):
        assert why_not(name) == reasons.get(name, why_not(name))


def test_the_page_of_models_has_these_names_under_their_methods() -> None:
    """docs/models.md; one of every structure is asked whether it takes Sparsifiner, too."""
    text = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text()
    if f"## timm {timm.__version__}" not in text:
        pytest.skip(f"the page was written for another timm than {timm.__version__}")
    listed = text.split(f"## timm {timm.__version__}")[1]
    paragraphs = re.findall(r"^(Merging and Sparsifiner|Merging): (.*?)\.$", listed, re.MULTILINE | re.DOTALL)
    told = {name: title for title, names in paragraphs for name in re.split(r",\s+", names)}
    reasons, kinds = surveyed()
    assert set(told) == {name for name, reason in reasons.items() if reason is None}
    for names in kinds.values():
        assert len({told[name] for name in names}) == 1, names
        model = build(names[0])
        try:
            vtoken.apply(model, vtoken.Sparsifiner())
        except vtoken.VTokenError:
            assert told[names[0]] == "Merging", names[0]
        else:
            assert told[names[0]] == "Merging and Sparsifiner", names[0]


def test_listing_by_pattern() -> None:
    found = vtoken.supported("deit3_*")
    assert found == timm.list_models("deit3_*")
    assert vtoken.supported("swin_tiny*") == []
    assert "vit_base_patch16_224" in vtoken.supported("vit_base_patch16_2*")
    assert vtoken.supported("no_such_model_*") == []


def sample() -> list[str]:
    """One name of every structure, and more to make at least 40."""
    _, kinds = surveyed()
    small = {key: min(names, key=_cost) for key, names in kinds.items()}
    chosen = list(small.values())
    rest = sorted((n for names in kinds.values() for n in names if n not in chosen), key=_cost)
    return chosen + rest[: max(0, 40 - len(chosen))]


def _cost(name: str) -> tuple[int, str]:
    """Cheap ones first: a meta forward costs by depth, not by width."""
    return (next((i for i, w in enumerate(("tiny", "small", "base", "medium")) if w in name), 9), name)


def tokens_of_blocks(model: Any, x: torch.Tensor) -> list[int]:
    """Tokens that enter block 0 and leave every block, as hooks see them."""
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        model(x)
    return seen


def test_plan_agrees_with_a_forward_of_every_structure() -> None:
    chosen = sample()
    assert len(chosen) >= 40
    for name in chosen:
        model = build(name)
        plan = vtoken.plan(model, _CONFIG)
        vtoken.apply(model, _CONFIG)
        seen = tokens_of_blocks(model, torch.empty(1, 3, *find_adapter(model).image_size(model), device="meta"))
        assert tuple(seen) == plan.tokens, name
        vtoken.remove(model)
        assert type(model).__module__.startswith("timm."), name
