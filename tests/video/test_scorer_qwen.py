"""The family of the published scorer, Qwen2-VL and Qwen2.5-VL: frames of any size, positions of three axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.video.answering import WORDS
from vtoken.accounting.prefill import Decoder, prefill_flops
from vtoken.accounting.vision import Tower, tower_flops
from vtoken.video import Clue, LVLMScorer, frame_question, scoring_flops

MARKS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
CLUE = Clue("objects", ("dog", "red shoe"), "which dog ?")
SIZES = [(32, 48), (64, 32), (32, 32)]  # 24, 32 and 16 tokens of 8 x 8 pixels


def build(name: str) -> tuple[Any, Any]:
    """A tiny model with random weights and its processor."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *MARKS.values()]
    words = special + list(dict.fromkeys(WORDS.split()))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        additional_special_tokens=special[2:], chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.image_token, tokenizer.video_token = MARKS["image_token_id"], MARKS["video_token_id"]
    processor = getattr(t, f"{name}Processor")(
        image_processor=t.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096),
        video_processor=t.Qwen2VLVideoProcessor(patch_size=4), tokenizer=tokenizer, chat_template=TEMPLATE,
    )  # fmt: skip
    text = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "vocab_size": len(words), "bos_token_id": None, "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2,
    }  # fmt: skip
    if name == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48, "fullatt_block_indexes": [1],
                   "window_size": 16}  # fmt: skip
    ids = {key: tokenizer.convert_tokens_to_ids(mark) for key, mark in MARKS.items()}
    config = getattr(t, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = getattr(t, f"{name}ForConditionalGeneration")(config).eval()
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model, processor


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_a_batch_of_frames_of_any_size_scores_as_each_alone(name: str) -> None:
    model, processor = build(name)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]
    expected, flops = [], 0
    yes, no = (processor.tokenizer.convert_tokens_to_ids(answer) for answer in "AB")
    for frame in frames:
        text = f"<|im_start|>user <|vision_start|><|image_pad|><|vision_end|>{frame_question(CLUE)}<|im_end|>"
        inputs = processor(
            text=[f"{text}<|im_start|>assistant"], images=[[Image.fromarray(frame)]], return_tensors="pt"
        )
        with torch.no_grad():
            weights = model(**inputs).logits[0, -1].double().exp()
        expected.append(float(weights[yes] / (weights[yes] + weights[no])))
        flops += tower_flops(Tower(2, 32, 64), frame.shape[0] * frame.shape[1] // 16)
        flops += prefill_flops(Decoder(2, 48, 96, 48), inputs["input_ids"].shape[1], causal=True)
    assert max(expected) - min(expected) > 0.01
    scorer = LVLMScorer(model, processor)
    scores = scorer.score(frames, CLUE)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)
    assert scoring_flops(scorer, frames, CLUE) == flops
