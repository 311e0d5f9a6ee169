"""Every prompt method in every family that can serve it: rows that stand for others, clues, and `vtoken.budget`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts import llavas  # noqa: E402
from tests.prompts import qwens  # noqa: E402
from vtoken.methods.divprune import max_min  # noqa: E402
from vtoken.methods.visionzip import merge_rest  # noqa: E402
from vtoken.prompts.budget import method_of  # noqa: E402

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
CONFIGS = [
    vtoken.DivPrune(num_tokens=5), vtoken.DivPrune(num_tokens=5, space="before"), vtoken.VisionZip(num_tokens=5),
    vtoken.VisionZip(keep_ratio=0.4, contextual=1), vtoken.CDPruner(num_tokens=5), vtoken.RandomTokens(num_tokens=5),
    vtoken.UniformTokens(num_tokens=5), vtoken.PooledTokens(num_tokens=5),
]  # fmt: skip


def flat_call(model: Any, kind: str = "llava") -> dict[str, Any]:
    n = llavas.feature_count(kind)
    given = llavas.prompt([1, 5, -n, 7, -n, 8], [1, -n, 6, 7], pad="left")
    return given | llavas.shown(model, llavas.images(3))


@pytest.mark.parametrize("kind", ["llava", "llava_siglip", "llava_full", "vip", "video"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_flat_models(kind: str, config: Any) -> None:
    model = llavas.build(kind)
    given = flat_call(model, kind)
    stock = model(**given).logits
    vtoken.apply(model, config)
    out, trace = vtoken.trace(model, **given)
    fixed = int(kind == "llava_full")
    u = 5 if config.num_tokens else 15
    assert trace.prompt.lengths == (u + fixed,) * 3
    if fixed:
        assert all(int(k[0]) == 0 for k in trace.prompt.kept)
    assert model.generate(**given, **GREEDY).shape == (2, given["input_ids"].shape[1] + 3)
    assert out.logits.shape[1] == stock.shape[1] - 2 * (36 - u)
    assert vtoken.num_tokens(model) == u + fixed
    vtoken.configure(model, keep_ratio=1.0, **({"contextual": 0} if config.method == "visionzip" else {}))
    assert torch.equal(model(**given).logits, stock)


@pytest.mark.parametrize("kind", llavas.ANYRES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_models_that_cut_images(kind: str, config: Any) -> None:
    from tests.prompts.frozen import make

    model = llavas.build(kind)
    given = make._crops(model)
    given |= llavas.prompt(*given.pop("rows"), pad="left")
    vtoken.apply(model, config)
    _, trace = vtoken.trace(model, **given)
    for visual, kept in zip(trace.prompt.visuals, trace.prompt.kept, strict=True):
        content = [i for i in kept.tolist() if i not in visual.separators]
        assert len(content) == method_of(model).count(visual, {})
    assert model.generate(**given, **GREEDY).shape[1] == given["input_ids"].shape[1] + 3


@torch.no_grad()
def test_choices_are_those_of_the_models_own_rows() -> None:
    model = llavas.build("llava")
    given = flat_call(model)
    features = llavas.features_of(model, pixel_values=given["pixel_values"])
    vtoken.apply(model, vtoken.DivPrune(num_tokens=5))
    out, trace = vtoken.trace(model, **given)
    expected = [max_min(f.unsqueeze(0), 5)[0] for f in features]
    assert [k.tolist() for k in trace.prompt.kept] == [e.tolist() for e in expected]
    assert trace.prompt.scores == ()
    vtoken.remove(model)
    fed = llavas.by_hand(model, given, features, [e.tolist() for e in expected], side="left")
    seen = trace.prompt.index >= 0
    assert_close("logits", model(**fed).logits[seen], out.logits[seen], 1e-5)


@torch.no_grad()
def test_merged_rows_enter_in_their_targets_places() -> None:
    """Means in front of the projector, by the tower's own hidden states and keys, projected by hand."""
    model = llavas.build("llava")
    given = flat_call(model)
    tower = model.model.vision_tower
    keys: list[torch.Tensor] = []
    hook = tower.encoder.layers[2].self_attn.k_proj.register_forward_hook(lambda m, i, o: keys.append(o))
    hidden = tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    hook.remove()
    heads = keys[0].unflatten(2, (3, -1)).mean(2)[:, 1:]
    scores = llavas.plain_scores(model, given["pixel_values"], 2, 2)
    features, kept = [], []
    for i in range(3):
        top = torch.tensor(llavas.plain_top(scores[i], 4))
        places, merged = merge_rest(hidden[i], heads[i], top, 1)
        row = llavas.features_of(model, pixel_values=given["pixel_values"])[i].clone()
        row[places] = model.model.multi_modal_projector(merged)
        features.append(row)
        kept.append(places.tolist())
    fed = llavas.by_hand(model, given, features, kept, side="left")
    expected = model(**fed).logits
    vtoken.apply(model, vtoken.VisionZip(num_tokens=5))
    out, trace = vtoken.trace(model, **given)
    assert [k.tolist() for k in trace.prompt.kept] == kept
    seen = trace.prompt.index >= 0
    assert_close("logits", expected[seen], out.logits[seen], 1e-5)
    assert_close("scores", scores[0], trace.prompt.scores[0], 1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3", "qwen3_5"])
@pytest.mark.parametrize("config", [c.replace(num_tokens=3) for c in CONFIGS], ids=str)
@torch.no_grad()
def test_qwen(kind: str, config: Any) -> None:
    model, given = qwens.build(kind), qwens.call(video=True, kind=kind)
    stock = model(**given).logits
    vtoken.apply(model, config)
    _, trace = vtoken.trace(model, **given)
    assert trace.prompt.lengths == (3, 3, 6, 3)
    assert model.generate(**given, **GREEDY, num_beams=2).shape[1] == given["input_ids"].shape[1] + 3
    vtoken.configure(model, keep_ratio=1.0, **({"contextual": 0} if config.method == "visionzip" else {}))
    assert torch.equal(model(**given).logits, stock)


@torch.no_grad()
def test_clues_of_a_call() -> None:
    model = llavas.build("llava")
    given = flat_call(model)
    vtoken.apply(model, vtoken.CDPruner(num_tokens=4))
    by_prompt = vtoken.trace(model, **given)[1].prompt
    words = given["input_ids"][0, -1:], given["input_ids"][1, -2:]
    queries = [words[0], words[0], words[1]]
    with vtoken.budget(model, query=queries):
        same = vtoken.trace(model, **given)[1].prompt
    assert all(torch.equal(a, b) for a, b in zip(by_prompt.kept, same.kept, strict=True))
    relevance = [torch.zeros(36).index_fill(0, torch.tensor([i + 3]), 1.0) for i in range(3)]
    with vtoken.budget(model, relevance=relevance):
        record = vtoken.trace(model, **given)[1].prompt
    for i, kept in enumerate(record.kept):
        assert i + 3 in kept.tolist()
        assert torch.equal(record.scores[i], relevance[i])
    with vtoken.budget(model, relevance=relevance[:2]), pytest.raises(vtoken.InputError, match="2 image"):
        model(**given)
    with vtoken.budget(model, relevance=[r[:9] for r in relevance]), pytest.raises(vtoken.InputError, match="9 values"):
        model(**given)
    bare = llavas.prompt([1, -36]) | {"pixel_values": llavas.images(1)}
    with pytest.raises(vtoken.InputError, match="instruction"):
        model(**bare)


@torch.no_grad()
def test_budgets_of_a_call() -> None:
    model = llavas.build("llava")
    given = flat_call(model)
    vtoken.apply(model, vtoken.VTCCLS(keep_ratio=0.5))
    stock = model(**given).logits
    with vtoken.budget(model, num_tokens=4):
        assert vtoken.trace(model, **given)[1].prompt.lengths == (4, 4, 4)
        assert vtoken.num_tokens(model) == 4
        with vtoken.budget(model, keep_ratio=0.25):
            assert vtoken.trace(model, **given)[1].prompt.lengths == (9, 9, 9)
        with vtoken.budget(model, num_tokens=[1, 36, 7]):
            assert vtoken.trace(model, **given)[1].prompt.lengths == (1, 36, 7)
            beams = model.generate(**given, **GREEDY, num_beams=3)
        assert vtoken.trace(model, **given)[1].prompt.lengths == (4, 4, 4)
    first = llavas.prompt([1, 5, -36, 7, -36, 8]) | {"pixel_values": given["pixel_values"][:2]}
    with vtoken.budget(model, num_tokens=[1, 36]):
        assert torch.equal(model.generate(**first, **GREEDY, num_beams=3)[:, -3:], beams[:1, -3:])
    assert torch.equal(model(**given).logits, stock)
    assert vtoken.config_of(model) == vtoken.VTCCLS(keep_ratio=0.5)

    async def ask(n: int) -> int:
        with vtoken.budget(model, num_tokens=n):
            await asyncio.sleep(0)
            return vtoken.trace(model, **given)[1].prompt.lengths[0]

    async def both() -> list[int]:
        return await asyncio.gather(ask(3), ask(8))

    assert asyncio.run(both()) == [3, 8]


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"num_tokens": 0}, "from 1 on"), ({"num_tokens": [3, True]}, "from 1 on"), ({"keep_ratio": 1.5}, r"\(0, 1\]"),
     ({"num_token": 3}, "did you mean 'num_tokens'"), ({"relevance": torch.ones(3)}, "relevance"),
     ({"num_tokens": 3, "keep_ratio": 0.5}, "exactly one")],
)  # fmt: skip
def test_bad_budgets(asked: dict[str, Any], message: str) -> None:
    model = llavas.build("llava")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=3))
    with pytest.raises(vtoken.ConfigError, match=message), vtoken.budget(model, **asked):
        pass
    with pytest.raises(vtoken.ConfigError, match="carries no method"), vtoken.budget(model.model, num_tokens=3):
        pass
