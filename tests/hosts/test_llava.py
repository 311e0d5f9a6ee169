"""VTC-CLS on flat LLaVA models: scores, kept sets, forward, loss, padding, record, removal."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import (  # noqa: E402
    FLAT,
    IMAGE,
    PATCHES,
    build,
    by_hand,
    feature_count,
    features_of,
    images,
    plain_scores,
    plain_top,
    prompt,
    shown,
)


@torch.no_grad()
def kept_by_hand(model: Any, pixels: Tensor, budget: int, start: int = 3, last: int = 2) -> list[list[int]]:
    return [plain_top(row, budget) for row in plain_scores(model, pixels, min(start, last), last)]


@pytest.mark.parametrize("kind", FLAT)
def test_keeping_all_changes_no_bit_and_removing_leaves_nothing(kind: str) -> None:
    model, n = build(kind), feature_count(kind)
    given = prompt([1, 5, -n, 7, 8], [1, -n, 6, 7, 9]) | shown(model, images())
    text = prompt([1, 5, 6, 7])
    with torch.no_grad():
        stock, alone = model(**given).logits, model(**text).logits
        before = _inventory(model)
        for config in (vtoken.VTCCLS(num_tokens=PATCHES), vtoken.VTCCLS(keep_ratio=1.0, positions="original")):
            with vtoken.applied(model, config):
                assert torch.equal(model(**given).logits, stock)
                assert torch.equal(model(**text).logits, alone)
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=5))
        assert type(model).__name__ == before["classes"][0].__name__
        assert isinstance(model, before["classes"][0])
        assert list(model.state_dict()) == before["keys"]
        pruned = model(**given).logits
        assert pruned.shape[1] == given["input_ids"].shape[1] - n + 5 + int(kind == "llava_full")
        assert torch.equal(model(**text).logits, alone)
        vtoken.remove(model)
        assert _inventory(model) == before
        assert torch.equal(model(**given).logits, stock)


def _inventory(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [type(m) for m in model.modules()],
        "keys": list(model.state_dict()),
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("start", "last", "layer"), [(None, 2, -2), (2, 2, -2), (0, 2, -2), (-3, 3, -1), (1, 1, 2)])
def test_scores_and_kept_sets_are_the_published_ones(
    implementation: str, start: int | None, last: int, layer: int
) -> None:
    model, pixels = build("llava", vision_feature_layer=layer).requires_grad_(False), images(3)
    first = min(3, last) if start is None else start % 4
    scores = plain_scores(model, pixels, first, last)
    model.set_attn_implementation(implementation)
    given = prompt([1, -36, -36, 7], [1, 5, -36, *[6] * 36]) | {"pixel_values": pixels}
    for budget in (1, 7, 20):
        with vtoken.applied(model, vtoken.VTCCLS(num_tokens=budget, start_layer=start)), torch.no_grad():
            _, trace = vtoken.trace(model, **given)
        record = trace.prompt
        assert record is not None
        assert record.layers == tuple(range(first, last + 1))
        for i in range(3):
            assert float((record.scores[i] - scores[i]).abs().max()) < 1e-6
            assert record.kept[i].tolist() == plain_top(scores[i], budget) == trace.kept(i).tolist()
        assert record.lengths == (budget,) * 3
        assert trace.grid == (6, 6)
    spread = float(scores.std(1).mean())
    assert spread > 0.2 / PATCHES, "attention was to be far from uniform"


@pytest.mark.parametrize("how", ["sum", "max", "min"])
def test_ensembles_reach_the_record(how: str) -> None:
    model, pixels = build("llava"), images(1)
    rows = torch.stack([plain_scores(model, pixels, i, i)[0] for i in range(3)])
    expected = {"sum": rows.sum(0), "max": rows.amax(0), "min": rows.amin(0)}[how]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=4, start_layer=0, ensemble=how))
    with torch.no_grad():
        _, trace = vtoken.trace(model, **prompt([1, -36]), pixel_values=pixels)
    assert_close(how, expected, trace.prompt.scores[0], 1e-5)


ROWS: dict[str, tuple[Any, ...]] = {
    "plain": ([1, 5, -36, 7, 8], [1, -36, 6, 7, 9]),
    "several images": ([1, -36, 5, -36, 7], [1, -36, -36, 6, 8]),
    "uneven": ([1, -36, 5, -36, 7], [1, 6, -36]),
    "text-only row": ([1, 5, 6, 7], [1, -36, -36, 9], [2, -36]),
}


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("case", list(ROWS))
@pytest.mark.parametrize("route", ["mm_encoder_outputs", "inputs_embeds"])
def test_logits_equal_hand_fed_embeddings(case: str, pad: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build("llava"), ROWS[case]
    count = sum(token == -36 for row in rows for token in row)
    pixels = images(count)
    given = prompt(*rows, pad=pad)
    labels = given["input_ids"].masked_fill((given["input_ids"] == IMAGE) | (given["attention_mask"] == 0), -100)
    kept = kept_by_hand(model, pixels, 6)
    expected = by_hand(model, given, features_of(model, pixel_values=pixels), kept, side=pad, labels=labels)
    with torch.no_grad():
        reference = model(**expected)
        other = model(**by_hand(model, given, features_of(model, pixel_values=pixels), [[*range(6)]] * count, side=pad))
        if route == "inputs_embeds":
            _without_mm_outputs(model, monkeypatch)
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
        out, trace = vtoken.trace(model, **given, labels=labels, pixel_values=pixels)
    real = expected["attention_mask"] == 1
    assert_close("logits", reference.logits[real], out.logits[real], 1e-5)
    assert_close("loss", reference.loss, out.loss, 1e-5)
    assert float((other.logits[real] - reference.logits[real]).abs().max()) > 1e-2, "the choice was to matter"
    index = trace.prompt.index
    assert torch.equal(index >= 0, real)
    old = given["input_ids"].gather(1, index.clamp_min(0))
    assert torch.equal(old[real], trace.prompt.input_ids[real])
    flat = [i for b in range(len(rows)) for i in (index[b][old[b] == IMAGE]).tolist()]
    places = [(given["input_ids"][b] == IMAGE).nonzero()[:, 0] for b in range(len(rows))]
    numbered = torch.cat(places)[torch.tensor([36 * i + j for i, k in enumerate(kept) for j in k])]
    assert flat == numbered.tolist()


def _without_mm_outputs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route of releases whose forward has no `mm_encoder_outputs`."""
    import inspect

    from vtoken.prompts import family

    class Older:
        Parameter = inspect.Parameter

        @staticmethod
        def signature(function: Any) -> Any:
            found = inspect.signature(function)
            return found.replace(parameters=[p for n, p in found.parameters.items() if n != "mm_encoder_outputs"])

    monkeypatch.setattr(family, "inspect", Older)


def test_missing_mask_is_made_where_rows_end_up_unequal() -> None:
    model, pixels = build("llava"), images(3)
    given = prompt([1, -36, -36, 7], [1, -36, *[5] * 37])
    kept = kept_by_hand(model, pixels, 6)
    with torch.no_grad():
        expected = by_hand(model, given, features_of(model, pixel_values=pixels), kept)
        reference = model(**expected).logits
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
        out = model(given["input_ids"], pixels)  # by position
    real = expected["attention_mask"] == 1
    assert_close("logits", reference[real], out.logits[real], 1e-5)


@pytest.mark.parametrize("kind", ["vip", "video", "llava_full", "llava_siglip"])
def test_other_flat_models(kind: str) -> None:
    model, n, pixels = build(kind), feature_count(kind), images(2)
    given = prompt([1, 5, -n, 7, 8], [1, -n, 6, 7, 9])
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with torch.no_grad():
        out, trace = vtoken.trace(model, **given, **shown(model, pixels))
        ids = model.generate(**given, **shown(model, pixels), max_new_tokens=3, do_sample=False)
        vtoken.remove(model)
        features = features_of(model, **shown(model, pixels))
        first = int(kind == "llava_full")
        if kind == "llava_siglip":
            kept = [plain_top(row, 6) for row in _received(model, pixels)]
            assert trace.prompt.scorer == "received"
        else:
            kept = [[*range(first), *(i + first for i in row)] for row in kept_by_hand(model, pixels, 6)]
        assert [k.tolist() for k in trace.prompt.kept] == kept
        assert [trace.kept(i).tolist() for i in range(2)] == [[j - first for j in k if j >= first] for k in kept]
        reference = model(**by_hand(model, given, features, kept)).logits
    assert_close("logits", reference, out.logits, 1e-5)
    assert torch.equal(ids[:, : given["input_ids"].shape[1]], given["input_ids"])
    assert torch.equal(ids[:, -3], reference[:, -1].argmax(-1))


def _received(model: Any, pixels: Tensor) -> Tensor:
    eager = copy.deepcopy(model)
    eager.model.vision_tower.set_attn_implementation("eager")
    maps = eager.model.vision_tower(pixels, output_attentions=True).attentions
    received: Tensor = maps[-1].mean((1, 2))
    return received


def test_feature_layer_per_call_is_honoured() -> None:
    model, pixels = build("llava"), images(1)
    given = prompt([1, -36, 5]) | {"pixel_values": pixels, "vision_feature_layer": 2}
    with torch.no_grad():
        features = features_of(model, pixel_values=pixels, vision_feature_layer=2)
        kept = kept_by_hand(model, pixels, 6, last=1)
        reference = model(**by_hand(model, prompt([1, -36, 5]), features, kept)).logits
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
        out, trace = vtoken.trace(model, **given)
        assert trace.prompt.layers == (1,)
        assert_close("logits", reference, out.logits, 1e-5)
        full = model(**prompt([1, -37, 5]), pixel_values=pixels, vision_feature_select_strategy="full")
        assert full.logits.shape[1] == 9
        vtoken.configure(model, start_layer=2)
        with pytest.raises(vtoken.ConfigError, match="0 to 1"):
            model(**given)


@torch.no_grad()
def test_images_of_another_size_by_interpolation() -> None:
    model, pixels = build("llava"), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    given, call = prompt([1, -64, 5]), {"pixel_values": pixels, "interpolate_pos_encoding": True}
    features = features_of(model, **call)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    out, trace = vtoken.trace(model, **given, **call)
    vtoken.remove(model)
    assert trace.grid == (8, 8)
    kept = trace.prompt.kept[0].tolist()
    assert kept == plain_top(trace.prompt.scores[0], 6)
    assert_close("logits", model(**by_hand(model, given, features, [kept])).logits, out.logits, 1e-5)


@torch.no_grad()
def test_the_output_keeps_what_the_tower_returned() -> None:
    model, given = build("llava"), prompt([1, -36, 5]) | {"pixel_values": images(1)}
    stock = model(**given)
    if "image_outputs" not in stock:
        pytest.skip("this transformers does not return it")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    ours, kept = model(**given).image_outputs, vtoken.trace(model, **given)[1].prompt.kept[0]
    assert torch.equal(ours.last_hidden_state, stock.image_outputs.last_hidden_state)
    assert torch.equal(ours.pooler_output[0], stock.image_outputs.pooler_output[0][kept])


@torch.no_grad()
def test_scores_use_the_factor_of_the_module() -> None:
    model, pixels = build("llava"), images(1)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.scale *= 2
    scores = plain_scores(model, pixels, 0, 2)[0]
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6, start_layer=0))
    assert_close(
        "scores", scores, vtoken.trace(model, **prompt([1, -36]), pixel_values=pixels)[1].prompt.scores[0], 1e-5
    )


def test_gradients_reach_the_projector_as_by_hand() -> None:
    model, pixels = build("llava"), images(2)
    given = prompt([1, 5, -36, 7, 8], [1, -36, 6, 7, 9])
    labels = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)
    kept = kept_by_hand(model, pixels, 6, start=0)
    weight = model.model.multi_modal_projector.linear_1.weight
    deep = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    model(**by_hand(model, given, features_of(model, pixel_values=pixels), kept, labels=labels)).loss.backward()
    expected, expected_deep = weight.grad.clone(), deep.grad.clone()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6, start_layer=0))
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.train()
        model.zero_grad()
        out = model(**given, pixel_values=pixels, labels=labels)
        second = model(**given, pixel_values=pixels.flip(0), labels=labels)
        out.loss.backward()
        assert_close("projector", expected, weight.grad, 1e-5)
        assert_close("tower", expected_deep, deep.grad, 1e-5)
        del second


def test_masked_tokens_inside_a_row_stay() -> None:
    model, pixels = build("llava"), images(1)
    given = prompt([1, 5, -36, 7, 8])
    mask = torch.ones_like(given["input_ids"])
    mask[0, 1] = 0
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with torch.no_grad():
        _, trace = vtoken.trace(model, **given, attention_mask=mask, pixel_values=pixels)
    assert trace.prompt.index[0, :2].tolist() == [0, 1]
    assert trace.prompt.input_ids.shape[1] == 10


def test_original_positions() -> None:
    model, pixels = build("llava"), images(2)
    given = prompt([1, 5, -36, 7, 8], [1, -36, 6, 7, 9])
    kept = kept_by_hand(model, pixels, 6)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6, positions="original"))
    with torch.no_grad():
        out, trace = vtoken.trace(model, **given, pixel_values=pixels)
        own = model(**given, pixel_values=pixels, position_ids=torch.arange(40).unsqueeze(0)).logits
        ids = model.generate(**given, pixel_values=pixels, max_new_tokens=4, do_sample=False)
        vtoken.remove(model)
        expected = by_hand(model, given, features_of(model, pixel_values=pixels), kept)
        compact = model(**expected).logits
        index = trace.prompt.index
        reference = model(**expected, position_ids=index).logits
        assert_close("logits", reference, out.logits, 1e-5)
        assert_close("own positions", reference, own, 1e-5)
        assert float((compact - reference).abs().max()) > 1e-2
        # Decoding goes on behind the last position of the full prompt.
        embeds, places, new = expected["inputs_embeds"], index, []
        for step in range(4):
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            token = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits[:, -1].argmax(-1)
            new.append(token)
            embeds = torch.cat([embeds, model.get_input_embeddings()(token).unsqueeze(1)], 1)
            places = torch.cat([places, torch.full((2, 1), 40 + step)], 1)
    assert torch.equal(ids[:, -4:], torch.stack(new, 1))


def test_positions_of_ones_own_in_compact_mode() -> None:
    model, pixels = build("llava"), images(2)
    given = prompt([1, 5, -36, 7, 8], [-36, 6], pad="left") | {"pixel_values": pixels}
    mask = given["attention_mask"]
    by_mask = (mask.cumsum(1) - 1).clamp_min(0)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(model(**given, position_ids=torch.arange(40).expand(2, -1)).logits, expected)
        real = mask[:, -10:] == 1
        assert_close("by mask", expected[real], model(**given, position_ids=by_mask).logits[real], 1e-4)
        with pytest.raises(vtoken.InputError, match="position_ids"):
            model(**given, position_ids=torch.arange(40).expand(2, -1) * 2)


def test_already_short_prompts_pass() -> None:
    model, pixels = build("llava"), images(2)
    full = prompt([1, 5, -36, 7, 8], [1, -36, 6, 7, 9])
    short = prompt([1, 5, -6, 7, 8], [1, -6, 6, 7, 9])
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    assert vtoken.num_tokens(model) == 6
    with torch.no_grad():
        expected = model(**full, pixel_values=pixels).logits
        out, trace = vtoken.trace(model, **short, pixel_values=pixels)
        assert torch.equal(out.logits, expected)
        assert trace.prompt.index.tolist() == [list(range(10))] * 2
        a = model.generate(**full, pixel_values=pixels, max_new_tokens=3, do_sample=False)
        b = model.generate(**short, pixel_values=pixels, max_new_tokens=3, do_sample=False)
        assert torch.equal(a[:, -3:], b[:, -3:])
        assert torch.equal(b[:, :10], short["input_ids"])


def test_ready_made_features_pass_unpruned() -> None:
    model, pixels = build("llava"), images(1)
    given = prompt([1, -36, 5])
    with torch.no_grad():
        stock = model(**given, pixel_values=pixels).logits
        embeds = by_hand(model, given, features_of(model, pixel_values=pixels), [[*range(36)]])
        vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
        assert model(**embeds).logits.shape == stock.shape
        if "mm_encoder_outputs" in model.forward.__signature__.parameters:
            ready = {"image": model.model.get_image_features(pixel_values=pixels)}
            assert torch.equal(model(**given, mm_encoder_outputs=ready).logits, stock)


def test_images_do_not_depend_on_their_neighbours() -> None:
    model, pixels = build("llava"), images(3)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    rows = prompt(*[[1, -36, 5 + i] for i in range(3)])["input_ids"]
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        _, a = vtoken.trace(model, input_ids=rows, pixel_values=pixels)
        _, b = vtoken.trace(model, input_ids=rows[order], pixel_values=pixels[order])
        _, c = vtoken.trace(model, input_ids=rows[1:2], pixel_values=pixels[1:2])
    assert [b.prompt.kept[i].tolist() for i in range(3)] == [a.prompt.kept[int(i)].tolist() for i in order]
    assert c.prompt.kept[0].tolist() == a.prompt.kept[1].tolist()
    budgets = []
    for budget in (5, 6, 7):
        vtoken.configure(model, num_tokens=budget)
        with torch.no_grad():
            budgets.append(set(vtoken.trace(model, input_ids=rows, pixel_values=pixels)[1].kept(0).tolist()))
    assert budgets[0] < budgets[1] < budgets[2]


def test_threads_share_one_model() -> None:
    model = build("llava")
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    jobs = [(prompt([1, *[-36] * n, 5]), images(n, seed=n + i)) for i, n in enumerate((1, 2, 3, 2))]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
    with torch.no_grad():
        expected = [model(**ids, pixel_values=x).logits for ids, x in jobs]
        kept = [[plain_top(s, 6) for s in plain_scores(model, x, 2, 2)] for _, x in jobs]
        texts = [model.generate(**ids, pixel_values=x, **options) for ids, x in jobs]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        ids, x = jobs[number]
        with torch.no_grad():
            for _ in range(5):
                out, trace = vtoken.trace(model, **ids, pixel_values=x)
                assert [k.tolist() for k in trace.prompt.kept] == kept[number]
                with vtoken.tracing(model) as record:
                    new = model.generate(**ids, pixel_values=x, **options)
                assert record.prompt is not None
                assert [k.tolist() for k in record.prompt.kept] == kept[number]
                assert torch.equal(new, texts[number])
        found[number] = out.logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(expected):
        assert_close(f"thread {number}", logits, found[number], 1e-6)


def test_lora_like_projections_and_hooks_on_them() -> None:
    model, pixels = build("llava"), images(1)

    class Added(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(48, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + self.down(x)
            return out

    attn = model.model.vision_tower.encoder.layers[2].self_attn
    attn.q_proj = Added(attn.q_proj)
    seen: list[Tensor] = []
    attn.k_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
    scores = plain_scores(model, pixels, 2, 2)
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6, start_layer=2))
    seen.clear()
    with torch.no_grad():
        _, trace = vtoken.trace(model, **prompt([1, -36]), pixel_values=pixels)
    assert len(seen) == 1, "the projection runs once and its hooks see a tensor"
    assert_close("scores", scores[0], trace.prompt.scores[0], 1e-5)


def test_low_precision_scores_are_float32() -> None:
    model, pixels = build("llava").bfloat16(), images(1).bfloat16()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    with torch.no_grad():
        out, trace = vtoken.trace(model, **prompt([1, -36]), pixel_values=pixels)
    assert out.logits.dtype == torch.bfloat16
    assert trace.prompt.scores[0].dtype == torch.float32


def test_nothing_outlives_a_call() -> None:
    model, given = build("llava"), prompt([1, -36]) | {"pixel_values": images(1)}
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))

    def alive() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    with torch.no_grad():
        model(**given)
        gc.collect()
        gc.disable()
        try:
            before = alive()
            for _ in range(3):
                model(**given)
            assert alive() == before
        finally:
            gc.enable()


def test_copies_and_saved_models(tmp_path: Any) -> None:
    model, given = build("llava"), prompt([1, -36, 7]) | {"pixel_values": images(1)}
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=6))
    # Before the first call: transformers itself installs hooks then that cannot be pickled.
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(**given).logits
        twin = copy.deepcopy(model)
        vtoken.remove(twin)
        assert twin(**given).logits.shape[1] == 38
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(**given).logits, expected)
        assert vtoken.config_of(loaded) == vtoken.VTCCLS(num_tokens=6)
        model.save_pretrained(tmp_path / "hub")
        plain = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub")
        with pytest.warns(vtoken.VTokenWarning, match="not applied"):
            assert not vtoken.is_applied(plain)
        vtoken.apply(plain.eval(), "vtc_cls", num_tokens=6)
        assert_close("loaded", expected, plain(**given).logits, 1e-6)


def test_user_subclass_keeps_its_forward() -> None:
    class Doubling(transformers.LlavaForConditionalGeneration):  # type: ignore[misc,name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    plain = build("llava")
    model = Doubling(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    given = prompt([1, -36, 7]) | {"pixel_values": images(1)}
    with torch.no_grad():
        for m in (plain, model):
            vtoken.apply(m, vtoken.VTCCLS(num_tokens=6))
        assert torch.equal(model(**given).logits, 2 * plain(**given).logits)
