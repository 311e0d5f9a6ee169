"""A LLaVA without a download: its image tower is the demo's pretrained ViT, its language model a random one.

What it answers means nothing; which image tokens its language model is shown does (within the limits of
`vtoken.demo.saliency`: fine-tuning for saliency damaged the class token).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtoken.demo.saliency import MEAN, NATIVE_SIZE, STD, load_saliency_vit

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = "<image>"
_PATCH = 14
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", IMAGE)
_RENAMES = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
}


def small_llava(words: str, cache_dir: Path | None = None) -> tuple[Any, Any]:
    """A `LlavaForConditionalGeneration` in eval mode, float32, and its `LlavaProcessor`, for 224 pixels, 256 tokens.

    Args:
        words: all that its tokenizer knows, divided by spaces; any other word is read as "<unk>".
        cache_dir: see `vtoken.demo.saliency.load_saliency_vit`.

    Raises:
        ImportError: if transformers or a package of the pretrained ViT is missing.
    """
    import transformers

    backbone = load_saliency_vit(cache_dir=cache_dir).backbone
    known = list(dict.fromkeys([*_SPECIAL, *words.split()]))
    vision = transformers.CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=NATIVE_SIZE,
        patch_size=_PATCH, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(known), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=known.index(IMAGE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    tower.pre_layrnorm = nn.Identity()  # a CLIP's own, which a DINOv2 has not
    tower.load_state_dict(_as_clip(backbone.state_dict()))
    return model, _processor(known)


def _as_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm's DINOv2 by the names of a CLIP tower, which knows neither layer scale nor a patch bias."""
    table = state["pos_embed"][0].clone()
    table[1:] += state["patch_embed.proj.bias"]
    found = {
        "embeddings.class_embedding": state["cls_token"].flatten(),
        "embeddings.position_embedding.weight": table,
        "post_layernorm.weight": state["norm.weight"],
        "post_layernorm.bias": state["norm.bias"],
    }
    for name, weight in state.items():
        scale = {"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"}
        for layer, gamma in scale.items():
            if f".{layer}." in name:
                by = state[f"{name.partition(layer)[0]}{gamma}"]
                weight = weight * (by[:, None] if weight.ndim == 2 else by)
        if name in ("pos_embed", "cls_token", "patch_embed.proj.bias", "norm.weight", "norm.bias") or "gamma" in name:
            continue
        for old, new in _RENAMES.items():
            name = name.replace(old, new)
        if "attn.qkv" in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"self_attn.{part}_proj")] = rows
        else:
            found[name] = weight
    return found


def _processor(known: list[str]) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[IMAGE],
    )  # fmt: skip
    side = {"height": NATIVE_SIZE, "width": NATIVE_SIZE}
    images = transformers.CLIPImageProcessor(size=side, do_center_crop=False, image_mean=MEAN, image_std=STD)
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=_PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=IMAGE,
    )  # fmt: skip
