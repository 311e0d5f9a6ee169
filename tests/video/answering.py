"""A tiny LLaVA-OneVision with a real processor, made from parts: word-level tokenizer, image processors, template."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SIDE, PATCH = 54, 6
WORDS = (
    "can any of these be seen in the picture does show this happening contain enough information to answer question "
    "with letter only A B C yes no dog cat red shoe which , . : ? ! user assistant step 1 2 3 [ ] \" '"
)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<video>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image> {% elif c.type == 'video' %}<video> "
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def tokenizer() -> Any:
    """Words and punctuation, in the order of the list after the special tokens."""
    words = SPECIAL + list(dict.fromkeys(WORDS.split()))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>", "<video>"], chat_template=TEMPLATE, padding_side="right",
    )  # fmt: skip


def processor() -> Any:
    """For the model below; frames of another shape than square become more tokens."""
    t = transformers
    size = {"height": SIDE, "width": SIDE}
    images = t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[54, 108], [108, 54], [108, 108]])
    return t.LlavaOnevisionProcessor(
        image_processor=images, tokenizer=tokenizer(), video_processor=t.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full", chat_template=TEMPLATE,
    )  # fmt: skip


def model(seed: int = 0) -> Any:
    """Random weights, with a loud projector, so that answers depend on the frame."""
    t = transformers
    ids = tokenizer()
    vision = t.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    text = t.Qwen2Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(ids), max_position_embeddings=2048, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = t.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_id=ids.convert_tokens_to_ids("<image>"),
        video_token_id=ids.convert_tokens_to_ids("<video>"), image_grid_pinpoints=[[54, 108], [108, 54], [108, 108]],
        vision_feature_layer=-1,
    )  # fmt: skip
    made = t.LlavaOnevisionForConditionalGeneration(config)
    rng = torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        gain = 2.5 if "projector" in name or "embed_tokens" in name else 1.2
        flat = p.dim() == 1
        p.data = torch.randn(p.shape, generator=rng) * (0.3 if flat else gain * p[0].numel() ** -0.5)
        if flat and "norm" in name and "weight" in name:
            p.data = 1 + p.data / 3
    return made.eval()
