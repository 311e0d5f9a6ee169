"""transformers' families of image models, a record each: where their layers are, what holds them, or why not.

The name of a family is its module in `transformers.models`. A tower whose layer is one of those in blocks.py is a
record here and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtoken.core.host import keys_of
from vtoken.core.spec import Pair
from vtoken.hosts.transformers.blocks import (
    Aimv2LayerMixin,
    ClipLayerMixin,
    DinoLayerMixin,
    LayerMixin,
    PixioLayerMixin,
    PixtralLayerMixin,
    RotaryDinoLayerMixin,
    VideoMaeLayerMixin,
    ViTLayerMixin,
    VitPoseLayerMixin,
)
from vtoken.hosts.transformers.heads import Aimv2HeadMixin, SizedHeadMixin
from vtoken.hosts.transformers.images import Grid, KeptPixels, NativePixels, PackedPixels, PatchRows, Pixels, Tubes


def no_prefix(config: Any) -> int:
    """No class token."""
    return 0


def class_and_registers(config: Any) -> int:
    """A class token, and register tokens where the configuration has some."""
    return 1 + int(getattr(config, "num_register_tokens", 0))


def class_and_distillation(config: Any) -> int:
    """DeiT's two."""
    return 2


PIXELS = Pixels()


def class_tokens(config: Any) -> int:
    """Pixio has several."""
    return int(config.n_cls_tokens)


def class_tokens_and_registers(config: Any) -> int:
    """RADIO has several of both."""
    return int(config.num_summary_tokens)


@dataclass(frozen=True)
class Family:
    """What vtoken knows of the classes of one module of `transformers.models`.

    Args:
        layer: class of the tower's layers.
        mixin: of the layers.
        path: attributes that lead from a tower to the list of its layers.
        backbone_path: the same from a backbone, where that is another.
        towers: classes that embed images and run the layers.
        backbones: the same for those that hand out maps, and must be given a value for every patch.
        holders: classes that hold a tower, and where.
        averaging: those of the holders that average the tower's tokens.
        pairs: those of the holders that compare images with texts, and their parts.
        prefix: number of class, register and distillation tokens, by the tower's configuration.
        images: how the towers take their images.
        pool: mixin of the attention pool `head`, where a tower has one.
        rotary: whether attention turns queries and keys by positions.
        why: classes that are refused and the reason; under "", that of all which are not named.
    """

    layer: str = ""
    mixin: type = LayerMixin
    path: tuple[str, ...] = ()
    backbone_path: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    holders: Mapping[str, str] = field(default_factory=dict)
    averaging: tuple[str, ...] = ()
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    prefix: Callable[[Any], int] = class_and_registers
    images: Pixels = PIXELS
    pool: type = SizedHeadMixin
    rotary: bool = False
    why: Mapping[str, str] = field(default_factory=dict)


_PROJECTED = Pair("vision_model", "text_model", "visual_projection")
_UNPROJECTED = Pair("vision_model", "text_model")
_CLIP: dict[str, Any] = {"mixin": ClipLayerMixin, "path": ("encoder", "layers")}
_VIT: dict[str, Any] = {"mixin": ViTLayerMixin, "path": ("layers",)}
_DINO: dict[str, Any] = {"mixin": DinoLayerMixin, "path": ("encoder", "layer"), "images": Pixels(resize="")}
_QUERIES = "it reads images by queries, which are not told how many patches each token stands for"
#: Why whole families are refused, which have no other record.
_REFUSED = {
    "its attention is made for a table of position biases, whose rows tokens would lose": "beit data2vec levit",
    "its attention works inside windows, so tokens cannot be removed": (
        "swin swinv2 swin2sr donut dinat lw_detr rf_detr florence2"
    ),
    "its attention works inside windows and adds positions of the grid, so tokens cannot be removed": (
        "sam sam_hq vitdet got_ocr2 pp_formulanet unlimited_ocr"
    ),
    "its image encoder works in windows or stages on the grid of patches, and masks are read off that grid": (
        "sam2 sam2_video sam3 sam3_lite_text sam3_tracker sam3_tracker_video sam3_video edgetam edgetam_video"
    ),
    "it pools tokens on a grid between stages, so tokens cannot be removed": "hiera",
    "it reshapes tokens to a grid between stages, so tokens cannot be removed": "pvt pvt_v2 segformer glpn cvt",
    "it mixes patches on their grid without attention between all of them, so tokens cannot be removed": (
        "poolformer focalnet mobilevit mobilevitv2 swiftformer"
    ),
    "it is a convolutional network, whose maps are no tokens": (
        "align bit convnext convnextv2 dinov3_convnext efficientnet hgnet_v2 mobilenet_v1 mobilenet_v2 pp_lcnet "
        "pp_lcnet_v3 pp_lcnet_v4 regnet resnet textnet uvdoc pp_ocrv5_mobile_det pp_ocrv6_small_det"
    ),
    "it detects on the maps of a backbone, at whose places every layer looks": (
        "conditional_detr d_fine dab_detr deformable_detr deimv2 detr rt_detr rt_detr_v2 table_transformer "
        "pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4"
    ),
    "its detection tokens stand behind the patches, where they would merge with them": "yolos",
    "it puts queries among the patches half way and reads masks off the patch grid": "eomt eomt_dinov3 videomt",
    "its attention is causal, so a token's place in the row is a part of the mask": "imagegpt",
    "its attention works out positions from a token's place in the row": "vjepa2",
    "its attention goes over time and space in turns, on the grid of every frame": "timesformer",
    "its attention goes over space first and then over time, on the grid of every frame": "videoprism",
    "it packs several tiles of an image on a grid, which merged tokens no longer have": "llava_next llava_onevision",
    "its tower packs the patches of all images into one row and joins neighbours on their grid behind its layers": (
        "qwen2_vl qwen2_5_vl qwen2_5_omni qwen3_vl qwen3_vl_moe glm4v glm4v_moe video_llama_3 cosmos3_edge "
        "cosmos3_omni dots3_note ernie4_5_vl_moe exaone4_5 glm46v glm5_next glm_ocr hy_v4_vl "
        "hyperclovax_vision_v2 inkling2 inkling2_loop kimi_k25 lfm3_vl lighton_ocr minimax_m3_vl mistral3 "
        "mistral_large4 paddleocr_vl qwen3_omni_moe qwen3_5 qwen3_5_moe qwen4_exp"
    ),
    "it shuffles patches into channels by their places on the grid": (
        "idefics3 smolvlm internvl cohere2_vision granite_docling lfm2_vl llama4 nemotron_h_omni qianfan_ocr"
    ),
    "it pools patches on their grid before the projector": (
        "gemma3 shieldgemma2 llava_next_video t5gemma2 gemma4 molmo2"
    ),
    "its language model reads images by cross-attention, not from the prompt": "idefics mllama",
    "its tower packs the patches of all images into one row and works in windows of their grid": (
        "minicpm_ocr minicpmv4_6 minicpmv4_7 muse_glimmer muse_spark"
    ),
    "it puts tokens back on the patch grid for convolutions behind its layers": "step3p7",
    "its image tower is a network of several stages over maps, whose places are no tokens": "fast_vlm gemma3n",
    "it segments on the maps of a backbone, of several scales": "mask2former oneformer",
    _QUERIES: "blip_2 instructblip instructblipvideo kosmos2_5 idefics2",
    "its projector knows how many queries go with the patches of a few image sizes, and no other number": "aria",
    "its latents read all places of the image by cross-attention, and the layers behind see only those": "perceiver",
    "its decoder reads image tokens by cross-attention and is not told how many patches each stands for": (
        "pix2struct vision_encoder_decoder"
    ),
    "its attention turns all images of a batch by one table, and merged tokens would need a row each": "mlcd",
    "its layers share keys among the heads, which vtoken does not read there yet": "sapiens2",
    "its encoder reads patches among words and adds a table of position biases": "udop",
    "it has no image tower: its language model reads the patches themselves": "fuyu gemma4_unified",
    "its image tower folds places into channels, without attention between them": "inkling",
    "its images become entries of a codebook, looked up on the maps of a convolutional network": "apertus1p5",
    "it is a language model without an image tower": "mistral4",
    "it reads proteins, no images": "evolla",
    "it joins the hidden states of the layers that its configuration names, place by place": "vipllava",
    "it joins the tokens of several towers place by place": "deepseek_vl_hybrid depth_pro",
}
#: Of these families the classes, with what derives from them, for which another reason holds; "": none is known.
_FUSED = "its attention makes queries, keys and values by one projection, of which vtoken does not take the keys"
_PADDED = "its patches may be padding, which a mask of their rows tells"
_REFUSED_TOWERS = {
    "data2vec": {
        "Data2VecTextPreTrainedModel": "it reads text, no images",
        "Data2VecAudioPreTrainedModel": "it reads sound, no images",
    },
    "blip_2": {"Blip2VisionModel": _FUSED},
    "instructblip": {"InstructBlipVisionModel": _FUSED},
    "instructblipvideo": {"InstructBlipVideoVisionModel": _FUSED},
    "idefics2": {"Idefics2VisionTransformer": _PADDED},
    "idefics3": {"Idefics3VisionTransformer": _PADDED},
    "smolvlm": {"SmolVLMVisionTransformer": _PADDED},
    "kosmos2_5": {"Kosmos2_5VisionModel": _PADDED},
    "pix2struct": {"Pix2StructVisionModel": _PADDED},
    "mllama": {
        "MllamaVisionModel": "it packs the tiles of an image into one row and joins hidden states of several layers"
    },
    "internvl": {"InternVLVisionModel": ""},
    "granite_docling": {"GraniteDoclingVisionModel": ""},
    "qianfan_ocr": {"QianfanOCRVisionModel": ""},
    "molmo2": {"Molmo2VisionModel": ""},
}

FAMILIES: dict[str, Family] = {
    "clip": Family(
        **_CLIP,
        layer="CLIPEncoderLayer",
        towers=("CLIPVisionModel",),
        holders={
            "CLIPModel": "vision_model",
            "CLIPVisionModelWithProjection": "vision_model",
            "CLIPForImageClassification": "vision_model",
        },
        averaging=("CLIPForImageClassification",),
        pairs={"CLIPModel": _PROJECTED},
    ),
    "siglip": Family(
        **_CLIP,
        layer="SiglipEncoderLayer",
        towers=("SiglipVisionModel",),
        holders={"SiglipModel": "vision_model", "SiglipForImageClassification": "vision_model"},
        averaging=("SiglipForImageClassification",),
        pairs={"SiglipModel": _UNPROJECTED},
        prefix=no_prefix,
    ),
    "siglip2": Family(
        **_CLIP,
        layer="Siglip2EncoderLayer",
        towers=("Siglip2VisionModel",),
        holders={"Siglip2Model": "vision_model", "Siglip2ForImageClassification": "vision_model"},
        averaging=("Siglip2ForImageClassification",),
        prefix=no_prefix,
        images=PatchRows(),
    ),
    "vit": Family(**_VIT, layer="ViTLayer", towers=("ViTModel",), holders={"ViTForImageClassification": "vit"}),
    "deit": Family(
        **_VIT,
        layer="DeiTLayer",
        towers=("DeiTModel",),
        holders={"DeiTForImageClassification": "deit", "DeiTForImageClassificationWithTeacher": "deit"},
        prefix=class_and_distillation,
    ),
    "dinov2": Family(
        **_DINO,
        layer="Dinov2Layer",
        towers=("Dinov2Model",),
        backbones=("Dinov2Backbone",),
        holders={"Dinov2ForImageClassification": "dinov2"},
        averaging=("Dinov2ForImageClassification",),
    ),
    "dinov2_with_registers": Family(
        **_DINO,
        layer="Dinov2WithRegistersLayer",
        towers=("Dinov2WithRegistersModel",),
        backbones=("Dinov2WithRegistersBackbone",),
        holders={"Dinov2WithRegistersForImageClassification": "dinov2_with_registers"},
        averaging=("Dinov2WithRegistersForImageClassification",),
    ),
    "metaclip_2": Family(
        **_CLIP,
        layer="MetaClip2EncoderLayer",
        towers=("MetaClip2VisionModel",),
        holders={
            "MetaClip2Model": "vision_model",
            "MetaClip2VisionModelWithProjection": "vision_model",
            "MetaClip2ForImageClassification": "vision_model",
        },
        averaging=("MetaClip2ForImageClassification",),
        pairs={"MetaClip2Model": _PROJECTED},
    ),
    "altclip": Family(
        **_CLIP,
        layer="AltCLIPEncoderLayer",
        towers=("AltCLIPVisionModel",),
        holders={"AltCLIPModel": "vision_model"},
        pairs={"AltCLIPModel": _PROJECTED},
    ),
    "chinese_clip": Family(
        **_CLIP,
        layer="ChineseCLIPVisionLayer",
        towers=("ChineseCLIPVisionModel",),
        holders={"ChineseCLIPModel": "vision_model"},
        pairs={"ChineseCLIPModel": _PROJECTED},
    ),
    "vit_msn": Family(
        **_VIT, layer="ViTMSNLayer", towers=("ViTMSNModel",), holders={"ViTMSNForImageClassification": "vit"}
    ),
    "ijepa": Family(
        **_VIT,
        layer="IJepaLayer",
        towers=("IJepaModel",),
        holders={"IJepaForImageClassification": "ijepa"},
        averaging=("IJepaForImageClassification",),
        prefix=no_prefix,
    ),
    "aimv2": Family(
        layer="Aimv2EncoderLayer",
        mixin=Aimv2LayerMixin,
        path=("encoder", "layers"),
        towers=("Aimv2VisionModel",),
        holders={"Aimv2Model": "vision_model"},
        prefix=no_prefix,
        images=NativePixels(),
        pool=Aimv2HeadMixin,
    ),
    "pixio": Family(
        layer="PixioLayer",
        mixin=PixioLayerMixin,
        path=("layers",),
        backbone_path=("pixio", "layers"),
        towers=("PixioModel",),
        backbones=("PixioBackbone",),
        prefix=class_tokens,
        images=Pixels(resize=""),
    ),
    "tipsv2": Family(
        **_DINO,
        layer="Tipsv2VisionLayer",
        towers=("Tipsv2VisionModel",),
        backbones=("Tipsv2VisionBackbone",),
        holders={"Tipsv2Model": "vision_model"},
    ),
    "dinov3_vit": Family(
        layer="DINOv3ViTLayer",
        mixin=RotaryDinoLayerMixin,
        path=("model", "layer"),
        towers=("DINOv3ViTModel",),
        backbones=("DINOv3ViTBackbone",),
        images=Pixels(resize=""),
        rotary=True,
    ),
    "git": Family(
        **_CLIP,
        layer="GitVisionEncoderLayer",
        towers=("GitVisionTransformer",),
        holders={
            "GitVisionModel": "vision_model",
            "GitModel": "image_encoder.vision_model",
            "GitForCausalLM": "git.image_encoder.vision_model",
        },
    ),
    "blip": Family(why={"": _FUSED}),
    "kosmos2": Family(
        **_CLIP,
        layer="Kosmos2VisionEncoderLayer",
        towers=("Kosmos2VisionTransformer",),
        holders={"Kosmos2VisionModel": "model"},
        why={"": _QUERIES},
    ),
    "janus": Family(
        **_CLIP,
        layer="JanusVisionEncoderLayer",
        towers=("JanusVisionModel",),
        holders={"JanusModel": "vision_model", "JanusForConditionalGeneration": "model.vision_model"},
        prefix=no_prefix,
        why={"JanusVisionModel": "its pooled output is the first patch, which may have merged with others"},
    ),
    "pixtral": Family(
        layer="PixtralAttentionLayer",
        mixin=PixtralLayerMixin,
        path=("transformer", "layers"),
        towers=("PixtralVisionModel",),
        prefix=no_prefix,
        images=PackedPixels(),
        rotary=True,
    ),
    "radio": Family(
        **_DINO
        | {"images": Pixels(resize="", unserved={"image_grid_hw": "it packs the patches of all images into one row"})},
        layer="RadioLayer",
        towers=("RadioModel",),
        prefix=class_tokens_and_registers,
    ),
    "clipseg": Family(
        **_CLIP,
        layer="CLIPSegEncoderLayer",
        towers=("CLIPSegVisionModel",),
        holders={"CLIPSegModel": "vision_model"},
        why={"CLIPSegForImageSegmentation": "its decoder reads the hidden states of several layers and a map off them"},
    ),
    "vit_mae": Family(
        **_VIT,
        layer="ViTMAELayer",
        towers=("ViTMAEModel",),
        images=KeptPixels(),
        why={"ViTMAEForPreTraining": "its decoder puts every kept token back at its place among the masked ones"},
    ),
    "vivit": Family(
        **_VIT,
        layer="VivitLayer",
        towers=("VivitModel",),
        holders={"VivitForVideoClassification": "vivit"},
        images=Tubes(),
    ),
    "videomae": Family(
        layer="VideoMAELayer",
        mixin=VideoMaeLayerMixin,
        path=("encoder", "layer"),
        towers=("VideoMAEModel",),
        holders={"VideoMAEForVideoClassification": "videomae"},
        averaging=("VideoMAEForVideoClassification",),
        prefix=no_prefix,
        images=Tubes(unserved={"bool_masked_pos": "it names tubes that stay away"}),
        why={"VideoMAEForPreTraining": "its decoder puts every visible token back at its place among the masked ones"},
    ),
    "vitpose_backbone": Family(
        layer="VitPoseBackboneLayer",
        mixin=VitPoseLayerMixin,
        path=("encoder", "layer"),
        backbones=("VitPoseBackbone",),
        prefix=no_prefix,
        images=Pixels(resize=None),
    ),
    "vitpose": Family(holders={"VitPoseForPoseEstimation": "backbone"}),
    "llava": Family(holders={"LlavaModel": "vision_tower", "LlavaForConditionalGeneration": "model.vision_tower"}),
    # A backbone's maps show a value for every patch, so whatever reads them need not know of merging.
    "depth_anything": Family(holders={"DepthAnythingForDepthEstimation": "backbone"}),
    "prompt_depth_anything": Family(holders={"PromptDepthAnythingForDepthEstimation": "backbone"}),
    "chmv2": Family(holders={"CHMv2ForDepthEstimation": "backbone"}),
    "tipsv2_dpt": Family(
        holders={
            "Tipsv2DptForDensePrediction": "backbone",
            "Tipsv2DptForDepthEstimation": "backbone",
            "Tipsv2DptForNormalEstimation": "backbone",
            "Tipsv2DptForSemanticSegmentation": "backbone",
        }
    ),
    "upernet": Family(holders={"UperNetForSemanticSegmentation": "backbone"}),
    "dpt": Family(
        holders={"DPTForDepthEstimation": "backbone"},
        why={
            "": "a neck puts the hidden states of its own layers on the patch grid, which merged tokens no longer "
            "have; DPTForDepthEstimation over a plain backbone (backbone_config) is supported"
        },
    ),
    "vision_text_dual_encoder": Family(
        holders={"VisionTextDualEncoderModel": "vision_model"}, pairs={"VisionTextDualEncoderModel": _PROJECTED}
    ),
    "zoedepth": Family(holders={"ZoeDepthForDepthEstimation": "backbone"}),
    "maskformer": Family(
        why={
            "": "it segments on the maps of a backbone, of several scales",
            **dict.fromkeys(
                ("MaskFormerSwinModel", "MaskFormerSwinBackbone"),
                "its attention works inside windows, so tokens cannot be removed",
            ),
        }
    ),
    **{
        name: Family(why={"": why, **_REFUSED_TOWERS.get(name, {})})
        for why, names in _REFUSED.items()
        for name in names.split()
    },
}


@dataclass(frozen=True)
class Known:
    """A class that its family's record names, or a subclass of one.

    Args:
        module: name of the family.
        name: the class that is named.
    """

    module: str
    name: str

    @property
    def family(self) -> Family:
        """The record."""
        return FAMILIES[self.module]


def _named(cls: type, *fields: str) -> Known | None:
    for module, name in keys_of(cls):
        family = FAMILIES.get(module)
        if family is not None and any(name in getattr(family, found) for found in fields):
            return Known(module, name)
    return None


def tower_known(cls: type) -> Known | None:
    """What a class of towers or backbones is known as."""
    return _named(cls, "towers", "backbones")


def holder_known(cls: type) -> Known | None:
    """What a class that holds a tower is known as."""
    return _named(cls, "holders")


def pair_known(cls: type) -> Pair | None:
    """Where a class that compares images with texts keeps its parts."""
    found = _named(cls, "pairs")
    return None if found is None else found.family.pairs[found.name]


def layer_known(cls: type) -> Known | None:
    """What a class of layers is known as."""
    for module, name in keys_of(cls):
        family = FAMILIES.get(module)
        if family is not None and name == family.layer:
            return Known(module, name)
    return None


def towers() -> list[str]:
    """Names of the classes that are towers."""
    return sorted({name for family in FAMILIES.values() for name in family.towers if name not in family.why})


def classes() -> list[str]:
    """Names of all classes that are supported."""
    return sorted({n for f in FAMILIES.values() for n in (*f.towers, *f.backbones, *f.holders) if n not in f.why})


def why_not(cls: type) -> str:
    """The reason for which a class that is not supported is refused; "" if there is none beside that."""
    keys = keys_of(cls)
    for module, _ in keys:
        why = FAMILIES[module].why if module in FAMILIES else {}
        named = [name for family, name in keys if family == module and name in why]
        if named or "" in why:
            return why[named[0] if named else ""]
    return ""


def family_of(tower: Any) -> Family:
    """The record of a tower's family."""
    module = tower.__dict__.get("_vtoken_family")  # of a patched one
    if module is None:
        known = tower_known(type(tower))
        assert known is not None
        module = known.module
    return FAMILIES[module]


def layers_of(tower: Any) -> Any:
    """The list of a tower's layers."""
    return functools.reduce(getattr, path_of(tower), tower)


def path_of(tower: Any) -> tuple[str, ...]:
    """The attributes that lead to the list of a tower's layers."""
    family, known = family_of(tower), tower_known(type(tower))
    return (
        family.backbone_path
        if known is not None and known.name in family.backbones and family.backbone_path
        else family.path
    )


def num_prefix(tower: Any) -> int:
    """Class, distillation and register tokens of a tower."""
    return family_of(tower).prefix(tower.config)


def grid_of(tower: Any, img_size: tuple[int, int]) -> Grid:
    """Patch rows and columns of an image of `img_size` (height, width) pixels."""
    return family_of(tower).images.patches(tower.config, img_size)
