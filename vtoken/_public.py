"""Everything that `vtoken` offers by name. Importing this imports torch and registers the methods.

`vtoken/__init__.py` hands the names out when the first of them is used.
"""

from typing import TYPE_CHECKING

from vtoken import nn, ops, train, video
from vtoken.accounting.prefill import kv_cache_bytes, prefill_flops
from vtoken.accounting.prompt_report import PromptReport, prompt_report
from vtoken.accounting.report import Report, report
from vtoken.core.apply import applied, apply, config_of, configure, is_applied, remove
from vtoken.core.compiled import compile
from vtoken.core.config import MethodConfig, config_from_dict, methods, register_method
from vtoken.core.counts import num_tokens, plan
from vtoken.core.host import HostAdapter, register_adapter
from vtoken.core.spec import HostSpec, Plan
from vtoken.core.trace import Trace, trace, tracing, unmerge
from vtoken.core.travel import load_settings, restore, save_settings
from vtoken.errors import (
    AlreadyAppliedError,
    ConfigError,
    InputError,
    ShapeError,
    UnsupportedModelError,
    VTokenError,
    VTokenWarning,
)
from vtoken.hosts.class_rows import cls_attention_scores
from vtoken.hosts.names import supported
from vtoken.methods.attentive_clip import AttentiveMaskCLIP, AttentiveMaskLoss, AttentiveMasks, MultiViewCrop
from vtoken.methods.cdpruner import CDPruner
from vtoken.methods.controls import PooledTokens, RandomTokens, UniformTokens
from vtoken.methods.divprune import DivPrune
from vtoken.methods.merging.base import MergeConfig, ScheduledMergeConfig
from vtoken.methods.merging.baselines import RandomMerge, RandomPrune, StrideMerge, ToMe
from vtoken.methods.merging.pitome import PiToMe
from vtoken.methods.merging.threshold import ThresholdMerge
from vtoken.methods.quota import QuoTA
from vtoken.methods.sparsifiner.calibrate import calibrate_threshold
from vtoken.methods.sparsifiner.settings import Sparsifiner
from vtoken.methods.visionzip import VisionZip
from vtoken.methods.vtc_cls import VTCCLS
from vtoken.ops import select_tokens
from vtoken.prompts.budget import budget
from vtoken.prompts.serving import encode_images, retained_count, retention_mask
from vtoken.prompts.shrink import shrink_inputs
from vtoken.tuning.tune import Tuned, tune
from vtoken.video.model import QuotaVideoModel

if TYPE_CHECKING:  # drawing needs optional packages, so it is imported when first used
    from vtoken import visualize
    from vtoken import visualize as viz

__all__ = [
    "VTCCLS",
    "AlreadyAppliedError",
    "AttentiveMaskCLIP",
    "AttentiveMaskLoss",
    "AttentiveMasks",
    "CDPruner",
    "ConfigError",
    "DivPrune",
    "HostAdapter",
    "HostSpec",
    "InputError",
    "MergeConfig",
    "MethodConfig",
    "MultiViewCrop",
    "PiToMe",
    "Plan",
    "PooledTokens",
    "PromptReport",
    "QuoTA",
    "QuotaVideoModel",
    "RandomMerge",
    "RandomPrune",
    "RandomTokens",
    "Report",
    "ScheduledMergeConfig",
    "ShapeError",
    "Sparsifiner",
    "StrideMerge",
    "ThresholdMerge",
    "ToMe",
    "Trace",
    "Tuned",
    "UniformTokens",
    "UnsupportedModelError",
    "VTokenError",
    "VTokenWarning",
    "VisionZip",
    "applied",
    "apply",
    "budget",
    "calibrate_threshold",
    "cls_attention_scores",
    "compile",
    "config_from_dict",
    "config_of",
    "configure",
    "encode_images",
    "is_applied",
    "kv_cache_bytes",
    "load_settings",
    "methods",
    "nn",
    "num_tokens",
    "ops",
    "plan",
    "prefill_flops",
    "prompt_report",
    "register_adapter",
    "register_method",
    "remove",
    "report",
    "restore",
    "retained_count",
    "retention_mask",
    "save_settings",
    "select_tokens",
    "shrink_inputs",
    "supported",
    "trace",
    "tracing",
    "train",
    "tune",
    "unmerge",
    "video",
    "visualize",
    "viz",
]
