"""Scores of frames: a language model's yes and CLIP's cosines against frame-by-frame references, and checks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vtoken
from tests.video import answering
from vtoken.accounting.prefill import Decoder, prefill_flops
from vtoken.accounting.vision import Tower, tower_flops
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.video import (
    CLIPScorer,
    Clue,
    CoTDecoupler,
    LVLMScorer,
    PrecomputedScorer,
    Scorer,
    UniformScorer,
    frame_question,
    score_frames,
    scoring_flops,
    text_generator,
    to_image,
)

OBJECTS = Clue("objects", ("dog", "red shoe"), "which dog ?")
EVENT = Clue("event", ("dog happening",), "which dog ?")
QUERY = Clue("query", (), "which dog ?")
SIZES = [(54, 54), (54, 100), (60, 30), (54, 54), (100, 100)]


def frames(seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return answering.model(), answering.processor()


def slow_probability(model: Any, processor: Any, frame: Any, question: str, kind: str) -> float:
    """One unpadded prompt, written out by hand; the logits of all positions, softmax in float64."""
    text = f"<s>user: <image> {question}</s><s>assistant:"
    inputs = processor(text=[text], images=[[Image.fromarray(frame)]], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].double()
    yes, no = (answering.tokenizer().convert_tokens_to_ids(answer) for answer in "AB")
    weights = logits.exp()
    return float(weights[yes] / (weights.sum() if kind == "full" else weights[yes] + weights[no]))


@pytest.mark.parametrize("clue", [OBJECTS, EVENT, QUERY], ids=lambda clue: clue.kind)
@pytest.mark.parametrize("kind", ["pair", "full"])
def test_lvlm_scores_are_those_of_each_frame_alone(lvlm: tuple[Any, Any], clue: Clue, kind: str) -> None:
    question = frame_question(clue)
    expected = [slow_probability(*lvlm, frame, question, kind) for frame in frames()]
    assert max(expected) - min(expected) > 0.02  # the frames do differ
    for batch_size in (1, 3, 8):
        scores = LVLMScorer(*lvlm, probability=kind, batch_size=batch_size).score(frames(), clue)
        assert scores.dtype == torch.float32
        assert not scores.is_inference()
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=2e-4, atol=1e-6)


def test_a_model_in_half_precision_scores_about_the_same(lvlm: tuple[Any, Any]) -> None:
    half = answering.model().to(torch.bfloat16)
    scores = LVLMScorer(half, lvlm[1]).score(frames(), OBJECTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, LVLMScorer(*lvlm).score(frames(), OBJECTS), rtol=0, atol=0.05)
    images = clip().to(torch.bfloat16)
    plain = CLIPScorer(clip(), WORDS, PREPROCESS, scale="softmax").score(frames(), OBJECTS)
    torch.testing.assert_close(
        CLIPScorer(images, WORDS, PREPROCESS, scale="softmax").score(frames(), OBJECTS), plain, rtol=0, atol=0.05
    )


def test_prompts_of_a_batch_are_padded_on_the_left(lvlm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = lvlm[0], []
    plain = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **named: seen.append(named) or plain(self, **named))
    LVLMScorer(*lvlm).score(frames(), QUERY)
    (named,) = seen
    assert named["logits_to_keep"] == 1
    lengths = named["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 2
    for row, length in zip(named["attention_mask"], lengths, strict=True):
        assert row[-int(length) :].all()
    assert lvlm[1].tokenizer.padding_side == "right"  # the user's own setting stays


def test_questions_name_what_is_looked_for() -> None:
    assert "dog, red shoe" in frame_question(OBJECTS)
    assert "dog happening" in frame_question(EVENT)
    assert "which dog ?" in frame_question(QUERY)
    for clue in (OBJECTS, EVENT, QUERY):
        text = frame_question(clue, "C", "D")
        assert "C. yes" in text
        assert "D. no" in text


def test_own_answers_template_and_pixel_limit(lvlm: tuple[Any, Any]) -> None:
    scorer = LVLMScorer(*lvlm, yes="B", no="A")
    plain = LVLMScorer(*lvlm, template=lambda clue: frame_question(clue, "B", "A")).score(frames(), OBJECTS)
    torch.testing.assert_close(scorer.score(frames(), OBJECTS), 1 - plain, rtol=1e-4, atol=1e-5)
    limited = LVLMScorer(*lvlm, max_pixels=2000).score(frames(), OBJECTS)
    small = []
    for frame in frames():
        picture = Image.fromarray(frame)
        factor = min(1.0, (2000 / (picture.width * picture.height)) ** 0.5)
        small.append(picture.resize((int(picture.width * factor), int(picture.height * factor))))
        assert small[-1].width * small[-1].height <= 2000
    assert torch.equal(limited, LVLMScorer(*lvlm).score(small, OBJECTS))


def test_every_form_of_a_frame_gives_the_same_score(lvlm: tuple[Any, Any]) -> None:
    scorer = LVLMScorer(*lvlm)
    arrays = frames()
    expected = scorer.score(arrays, OBJECTS)
    chw = [torch.from_numpy(f).permute(2, 0, 1) for f in arrays]
    for other in (
        [Image.fromarray(f) for f in arrays],
        [torch.from_numpy(f) for f in arrays],
        chw,
        [f.float() / 255 for f in chw],
        [f.double().numpy() / 255 for f in chw],
    ):
        assert torch.equal(scorer.score(other, OBJECTS), expected)
    with pytest.raises(ShapeError, match=r"got \(54, 54\)"):
        to_image(arrays[0][..., 0])
    with pytest.raises(InputError, match="must lie in"):
        to_image(chw[0].float())
    with pytest.raises(InputError, match="uint8 or fractions"):
        to_image(chw[0].long())


def test_scoring_leaves_train_and_eval_flags_and_gradients(lvlm: tuple[Any, Any]) -> None:
    model = answering.model()
    model.train()
    model.model.vision_tower.eval()
    flags = [module.training for module in model.modules()]
    assert torch.equal(LVLMScorer(model, lvlm[1]).score(frames(), OBJECTS), LVLMScorer(*lvlm).score(frames(), OBJECTS))
    assert [module.training for module in model.modules()] == flags

    class Broken(nn.Module):
        def encode_image(self, pixels: Tensor) -> Tensor:
            assert not self.training
            raise RuntimeError("broken")

        def encode_text(self, ids: Tensor) -> Tensor:
            raise RuntimeError("broken")

    broken = Broken()
    broken.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="broken"):
        CLIPScorer(broken, lambda texts: torch.zeros(1, 1), lambda image: torch.zeros(3, 4, 4)).score(frames(), QUERY)
    assert broken.training
    assert torch.is_grad_enabled()


def test_lvlm_settings_are_checked(lvlm: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'A B' is 2 tokens \[\d+, \d+\]"):
        LVLMScorer(*lvlm, yes="A B")
    with pytest.raises(ConfigError, match="are the same token"):
        LVLMScorer(*lvlm, no="A")
    with pytest.raises(ConfigError, match="probability must be one of pair, full"):
        LVLMScorer(*lvlm, probability="logit")
    with pytest.raises(ConfigError, match="batch_size=0"):
        LVLMScorer(*lvlm, batch_size=0)
    assert LVLMScorer(*lvlm).score([], QUERY).shape == (0,)


def test_the_answering_model_decouples_without_images(lvlm: tuple[Any, Any]) -> None:
    for source in (lvlm[1], lvlm[1].tokenizer):
        generate = text_generator(lvlm[0], source, max_new_tokens=6)
        ids = lvlm[1].tokenizer("<s>user: which dog ?</s><s>assistant:", return_tensors="pt", add_special_tokens=False)
        out = []
        for _ in range(6):  # greedy, without a cache
            row = torch.cat([ids["input_ids"], torch.tensor([out], dtype=torch.int64)], dim=1)
            with torch.no_grad():
                out.append(int(lvlm[0](input_ids=row).logits[0, -1].argmax()))
        assert generate("which dog ?") == lvlm[1].tokenizer.decode(out, skip_special_tokens=True)
        decoupler = CoTDecoupler(generate)
        assert decoupler.decouple("which dog ?").text == "which dog ?"
        assert decoupler.last_reply == generate(decoupler.prompt("which dog ?"))


def clip(bias: float | None = None) -> Any:
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        init_logit_bias=bias,
    )
    for p in model.visual.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    return model.eval()


PREPROCESS = open_clip.image_transform(32, is_train=False)
WORDS = open_clip.SimpleTokenizer(context_length=12)


def slow_cosines(model: Any, texts: list[str]) -> list[list[float]]:
    """Frame by frame and text by text, in float64 after the towers."""
    rows = []
    with torch.no_grad():
        for frame in frames():
            image = model.encode_image(PREPROCESS(Image.fromarray(frame))[None])[0].double()
            row = []
            for text in texts:
                words = model.encode_text(WORDS([text]))[0].double()
                row.append(float(image @ words / (image.norm() * words.norm())))
            rows.append(row)
    return rows


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("scale", ["minmax", "softmax", "sigmoid"])
@pytest.mark.parametrize("clue", [OBJECTS, EVENT, QUERY], ids=lambda clue: clue.kind)
def test_clip_scores_against_a_loop(reduce: str, scale: str, clue: Clue) -> None:
    model = clip(bias=-3.0)
    texts = {"objects": ["dog", "red shoe"], "event": ["dog happening"], "query": ["which dog ?"]}[clue.kind]
    rows = slow_cosines(model, texts)
    flat = [max(row) if reduce == "max" else sum(row) / len(row) for row in rows]
    factor = math.exp(model.logit_scale.item())
    expected = {
        "minmax": [(c - min(flat)) / (max(flat) - min(flat)) for c in flat],
        "softmax": [math.exp(factor * c) / sum(math.exp(factor * d) for d in flat) for c in flat],
        "sigmoid": [1 / (1 + math.exp(-(factor * c - 3.0))) for c in flat],
    }[scale]
    for batch_size in (2, 32):
        scorer = CLIPScorer(model, WORDS, PREPROCESS, reduce=reduce, scale=scale, batch_size=batch_size)
        scores = scorer.score(frames(), clue)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-3)


def test_equal_frames_score_a_half_and_a_reduced_tower_scores_too() -> None:
    scorer = CLIPScorer(clip(), WORDS, PREPROCESS)
    assert scorer.score([frames()[0]] * 4, QUERY).tolist() == [0.5] * 4
    assert scorer.score([], QUERY).shape == (0,)
    plain = scorer.cosines(frames(), ["dog"]).detach()
    vtoken.apply(scorer.model, vtoken.ToMe(r=2))
    reduced = scorer.score(frames(), QUERY)
    assert bool(reduced.isfinite().all())
    assert not torch.equal(scorer.cosines(frames(), ["dog"]), plain)
    with pytest.raises(ConfigError, match="needs a logit bias"):
        CLIPScorer(clip(), WORDS, PREPROCESS, scale="sigmoid")
    with pytest.raises(ConfigError, match="scale must be one of minmax, softmax, sigmoid"):
        CLIPScorer(clip(), WORDS, PREPROCESS, scale="linear")
    with pytest.raises(ConfigError, match="batch_size=0"):
        CLIPScorer(clip(), WORDS, PREPROCESS, batch_size=0)


def test_flops_of_scorers(lvlm: tuple[Any, Any]) -> None:
    assert scoring_flops(UniformScorer(), [0, 0], QUERY) == 0
    assert scoring_flops(PrecomputedScorer([1, 2]), [0, 0], QUERY) == 0
    tower = Tower(layers=2, width=32, mlp_width=128)
    assert scoring_flops(CLIPScorer(clip(), WORDS, PREPROCESS), frames(), QUERY) == 5 * tower_flops(tower, 17)
    # A square frame becomes two crops beside the whole, a wide one four, of 81 patches each.
    square, wide = frames()[0], frames()[4]
    for frame, crops in ((square, 3), (wide, 5)):
        made = lvlm[1](text=["<image>"], images=[[Image.fromarray(frame)]], return_tensors="pt")
        assert made["pixel_values"].shape[1] == crops
        words = lvlm[1].tokenizer(f"<s>user: {frame_question(QUERY)}</s><s>assistant:", add_special_tokens=False)
        length = made["input_ids"].shape[1] + len(words["input_ids"])
        expected = crops * tower_flops(Tower(2, 32, 64), 81)
        expected += prefill_flops(Decoder(2, 48, 96, 24), length, causal=True)
        assert scoring_flops(LVLMScorer(*lvlm), [frame], QUERY) == expected

    class Mine:
        def score(self, frames: Any, clue: Clue) -> Tensor:
            return torch.ones(len(frames))

    assert scoring_flops(Mine(), [0], QUERY) is None


def test_given_scores_and_none() -> None:
    three = [object()] * 3
    assert UniformScorer().score(three, QUERY).tolist() == [0.5] * 3
    for given in ([0.25, 0, 1], torch.tensor([0.25, 0, 1], dtype=torch.bfloat16), np.array([0.25, 0, 1])):
        scores = PrecomputedScorer(given).score(three, QUERY)
        assert scores.tolist() == [0.25, 0, 1]
        assert scores.dtype == torch.float32
    with pytest.raises(ValueError, match=r"scores of shape \(2,\) for 3 frames"):
        PrecomputedScorer([0.1, 0.2]).score(three, QUERY)
    for wrong, said in ((math.nan, "nan for frame 1"), (math.inf, "inf for frame 1"), (-0.5, "-0.5 for frame 1")):
        with pytest.raises(ValueError, match=said):
            PrecomputedScorer([0.1, wrong, 0.2]).score(three, QUERY)


def test_scores_of_a_scorer_of_your_own_are_checked() -> None:
    class Mine:
        def __init__(self, given: Any) -> None:
            self.given = given

        def score(self, frames: Any, clue: Clue) -> Tensor:
            return self.given

    assert isinstance(Mine(None), Scorer)
    assert score_frames(Mine(torch.tensor([1, 2])), [0, 0], QUERY).tolist() == [1, 2]
    for given in (torch.ones(3), torch.ones(2, 1), torch.tensor([1, -1.0]), torch.tensor([1, math.nan])):
        with pytest.raises(ValueError, match="Mine gave"):
            score_frames(Mine(given), [0, 0], QUERY)
