"""Merging in the tower and pruning behind it, in both orders of apply, and removing either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close
from tests.methods.sparse_hosts import taught
from vtoken.core.method import BlockMethod

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import build, by_hand, images, plain_top, prompt  # noqa: E402

TOWER, PROMPT = vtoken.PiToMe(ratio=0.85), vtoken.VTCCLS(num_tokens=5, start_layer=0)


def both(order: str) -> Any:
    model = build("llava")
    if order == "list":
        return vtoken.apply(model, [TOWER, PROMPT])
    for config in (TOWER, PROMPT) if order == "tower first" else (PROMPT, TOWER):
        vtoken.apply(model, config)
    return model


@pytest.mark.parametrize("order", ["tower first", "prompt first", "list"])
def test_both_orders_and_either_removal(order: str) -> None:
    stock, x = build("llava"), images(2)
    with torch.no_grad():
        full = prompt([1, -36, 5, 6], [2, -36, 7, 8])
        logits = stock(**full, pixel_values=x).logits
        pruned = vtoken.apply(stock, PROMPT)(**full, pixel_values=x).logits
        vtoken.remove(stock)
        count = vtoken.num_tokens(vtoken.apply(stock, TOWER))
        merged_prompt = prompt([1, -count, 5, 6], [2, -count, 7, 8])
        merged = stock(**merged_prompt, pixel_values=x).logits
        for left, given, expected in (("vtc_cls", full, pruned), ("pitome", merged_prompt, merged)):
            model = both(order)
            assert set(vtoken.config_of(model)) == {TOWER, PROMPT}
            assert vtoken.num_tokens(model) == 5
            assert model(**merged_prompt, pixel_values=x).logits.shape[1] == 8
            vtoken.remove(model, "pitome" if left == "vtc_cls" else "vtc_cls")
            assert vtoken.config_of(model).method == left
            assert torch.equal(model(**given, pixel_values=x).logits, expected)
            with pytest.raises(vtoken.VTokenError, match=f"carries {left}, not"):
                vtoken.remove(model, "tome")
            vtoken.remove(model)
            assert not any(n.startswith("_vtoken") for m in model.modules() for n in vars(m))
            assert torch.equal(model(**full, pixel_values=x).logits, logits)


@pytest.mark.parametrize("order", ["tower first", "prompt first"])
def test_compiled_blocks_of_the_tower(order: str) -> None:
    """Blocks that VTC-CLS reads run as they are, the others by their graph, which goes with the merging."""
    model, x = both(order), images(2)
    count = vtoken.num_tokens(model, TOWER)
    given = prompt([1, -count, 5, 6], [2, -count, 7, 8])
    with torch.no_grad():
        eager = model(**given, pixel_values=x).logits
        vtoken.compile(model, backend="eager")
        assert_close("logits", eager, model(**given, pixel_values=x).logits, 1e-5)
        vtoken.remove(model, "pitome")
        alone = vtoken.apply(build("llava"), PROMPT)
        full = prompt([1, -36, 5, 6], [2, -36, 7, 8])
        assert torch.equal(model(**full, pixel_values=x).logits, alone(**full, pixel_values=x).logits)


def test_scores_follow_merged_tokens() -> None:
    """A token's score in every layer is the attention on all patches that it ends up standing for."""
    model, x = both("tower first"), images(2)
    count = vtoken.num_tokens(model, TOWER)
    given = prompt([1, -count, 5, 6], [2, -count, 7, 8])
    with torch.no_grad():
        out, trace = vtoken.trace(model, **given, pixel_values=x)
        record = trace.prompt
        scores = _by_hand_scores(model, x)
        features = list(model.model.get_image_features(pixel_values=x).pooler_output)
        kept = [plain_top(row, 5) for row in scores]
        for i in range(2):
            assert_close("scores", scores[i], record.scores[i], 1e-5)
            assert record.kept[i].tolist() == kept[i]
            anchors = trace.layer_anchor[2][i, 1:] - 1
            assert trace.kept(i).tolist() == anchors[kept[i]].tolist()
        assert record.layers == (0, 1, 2)
        assert len(features[0]) == count == len(record.scores[0])
        vtoken.remove(model, "vtc_cls")
        reference = model(**by_hand(model, given, features, kept)).logits
    assert_close("logits", reference, out.logits, 1e-5)
    assert trace.tokens[0] == 37
    assert trace.num_forwards == 1
    for row in record.scores:
        assert 0.5 < float(row.sum()) < 1, "attention on patches is not lost by merging"


def _by_hand_scores(model: Any, x: Tensor) -> list[Tensor]:
    """From hidden states in the tower's own order: class rows with log-sizes, summed over final groups."""
    from vtoken.core.state import TokenState

    tower = model.model.vision_tower
    state = TokenState(tower._vtoken.methods[BlockMethod], 1, track_anchor=True, track_dest=True)
    h, rows = tower.pre_layrnorm(tower.embeddings(x)), []
    groups = torch.arange(37).expand(2, -1)
    members = []
    for i, layer in enumerate(tower.encoder.layers[:3]):
        attn, y = layer.self_attn, layer.layer_norm1(h)
        q, k = (p(y).unflatten(2, (3, 16)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
        size = torch.ones(h.shape[:2]) if state.slots[i].size is None else state.slots[i].size
        assert size is not None
        logits = q[:, :, :1] @ k.transpose(2, 3) * 0.25 + size.log()[:, None, None]
        rows.append(logits.softmax(-1)[:, :, 0].mean(1))
        members.append(groups)
        h = layer(h, None, vtoken_state=state)
        dest = state.slots[i + 1].dest
        assert dest is not None
        groups = dest
    anchor = state.slots[3].anchor
    assert anchor is not None
    found = []
    for b in range(2):
        final = torch.zeros(anchor.shape[1])
        for row, group in zip(rows, members, strict=True):
            for token in range(row.shape[1]):
                patch = int((group[b] == token).nonzero()[0])  # any patch that the token stands for
                final[int(groups[b, patch])] += row[b, token] / 3
        found.append(final[anchor[b].argsort()][1:])
    return found


def test_generate_trace_and_configure() -> None:
    model, x = both("prompt first"), images(2)
    count = vtoken.num_tokens(model, TOWER)
    given = prompt([1, -count, 5, 6], [2, -count, 7, 8])
    with torch.no_grad():
        first = model(**given, pixel_values=x).logits[:, -1].argmax(-1)
        with vtoken.tracing(model) as record:
            ids = model.generate(**given, pixel_values=x, max_new_tokens=3, do_sample=False)
        assert torch.equal(ids[:, -3], first)
        assert torch.equal(ids[:, :-3], given["input_ids"])
        assert record.tokens[0] == 37
        assert record.prompt is not None
        vtoken.configure(model, num_tokens=3)
        assert model(**given, pixel_values=x).logits.shape[1] == 6
        vtoken.configure(model, ratio=1.0)
        assert vtoken.num_tokens(model, vtoken.PiToMe(ratio=1.0)) == 36
        assert model(**prompt([1, -36, 5]), pixel_values=x[:1]).logits.shape[1] == 5
        with pytest.raises(vtoken.VTokenError, match="exactly one"):
            vtoken.configure(model, nonsense=1)


def test_merging_nothing_is_exact() -> None:
    """Pruning behind a tower that merges nothing is pruning alone."""
    x, given = images(2), prompt([1, -36, 5, 6], [2, -36, 7, 8])
    alone, with_tower = build("llava"), build("llava")
    vtoken.apply(alone, PROMPT)
    vtoken.apply(with_tower, [vtoken.PiToMe(ratio=1.0), PROMPT])
    with torch.no_grad():
        assert torch.equal(alone(**given, pixel_values=x).logits, with_tower(**given, pixel_values=x).logits)


def test_clashes_and_failures_leave_the_model_as_it_was() -> None:
    model = both("tower first")
    for again in (vtoken.ToMe(ratio=0.9), PROMPT, [TOWER, PROMPT]):
        with pytest.raises(vtoken.AlreadyAppliedError):
            vtoken.apply(model, again)
    with pytest.raises(vtoken.ConfigError, match="0 to 2"):
        vtoken.apply(build("llava"), [TOWER, PROMPT.replace(start_layer=3)])
    vtoken.apply(model, vtoken.ToMe(ratio=0.9), replace=True)
    assert set(vtoken.config_of(model)) == {vtoken.ToMe(ratio=0.9), PROMPT}
    model = build("llava")
    vtoken.apply(model, TOWER)
    with vtoken.applied(model, PROMPT):
        assert len(vtoken.config_of(model)) == 2
    assert vtoken.config_of(model) == TOWER
    with pytest.raises(RuntimeError, match="on purpose"), vtoken.applied(model, PROMPT):
        raise RuntimeError("on purpose")
    assert vtoken.config_of(model) == TOWER


@pytest.mark.parametrize("config", [vtoken.RandomPrune(ratio=0.8), vtoken.ToMe(ratio=0.8, order="internal")])
def test_other_methods_in_the_tower(config: Any) -> None:
    model, x = build("llava"), images(2)
    vtoken.apply(model, [config, PROMPT])
    count = vtoken.num_tokens(model, config)
    given = prompt([1, -count, 5, 6], [2, -count, 7, 8])
    with torch.no_grad():
        out, trace = vtoken.trace(model, **given, pixel_values=x)
    assert out.logits.shape[1] == 8
    for i in range(2):
        assert 0.5 < float(trace.prompt.scores[i].sum()) < 1
        assert trace.prompt.kept[i].tolist() == plain_top(trace.prompt.scores[i], 5)


def test_connectivity_masks_in_the_tower_and_ranks_by_the_class_token() -> None:
    """The class token keeps all its keys, so its row is that of the attention which runs."""
    model, x = taught(vtoken.apply(build("llava"), [vtoken.Sparsifiner(keep_ratio=0.4), PROMPT])), images(2)
    count = vtoken.num_tokens(model, vtoken.Sparsifiner(keep_ratio=0.4))
    given = prompt([1, -count, 5, 6], [2, -count, 7, 8])
    with torch.no_grad(), vtoken.tracing(model, maps=("attention",)) as trace:
        out = model(**given, pixel_values=x)
    assert out.logits.shape[1] == 8
    assert all(0.39 < record.density < 0.42 for record in trace.attention)
    read = [r.attention[:, :, 0, 1:].mean(1) for r in trace.attention[:3]]  # those that are read
    assert_close("class row", torch.stack(read).mean(0), torch.stack(list(trace.prompt.scores)), 1e-5)
    with torch.no_grad():
        assert_close("untraced", out.logits, model(**given, pixel_values=x).logits, 1e-6)


def test_what_a_patch_receives_under_masks_is_not_read() -> None:
    prompts, x = vtoken.VTCCLS(num_tokens=5), images(2)
    model, plain = build("llava_siglip"), vtoken.apply(build("llava_siglip"), prompts)
    vtoken.apply(model, [vtoken.Sparsifiner(keep_ratio=1.0), prompts])
    count = vtoken.num_tokens(model, vtoken.Sparsifiner(keep_ratio=1.0))
    given = prompt([1, -count, 5], [2, -count, 7])
    with torch.no_grad():
        assert torch.equal(model(**given, pixel_values=x).logits, plain(**given, pixel_values=x).logits)
        vtoken.configure(model, keep_ratio=0.4, mode="exact")
        with pytest.raises(vtoken.InputError, match=r"block 3 attends by a connectivity mask.*`layers`"):
            model(**given, pixel_values=x)
        vtoken.apply(model, [vtoken.Sparsifiner(keep_ratio=0.4, layers=(0, 1)), prompts], replace=True)
        assert model(**given, pixel_values=x).logits.shape[1] == 7


def test_merging_with_the_tower_of_a_model_without_class_token() -> None:
    model, x = build("llava_siglip"), images(2)
    vtoken.apply(model, [vtoken.PiToMe(ratio=0.85), vtoken.VTCCLS(num_tokens=5)])
    count = vtoken.num_tokens(model, vtoken.PiToMe(ratio=0.85))
    with torch.no_grad():
        _, trace = vtoken.trace(model, **prompt([1, -count, 5], [2, -count, 7]), pixel_values=x)
    assert trace.prompt.scorer == "received"
    assert float(trace.prompt.scores[0].sum()) == pytest.approx(1, abs=1e-5)
