"""Attentive-mask training of CLIP models (arXiv 2212.08653): the wrapper, its settings, its losses and its crops."""

from vtoken.methods.attentive_clip.crop import MultiViewCrop
from vtoken.methods.attentive_clip.loss import AttentiveMaskLoss
from vtoken.methods.attentive_clip.model import AttentiveMaskCLIP
from vtoken.methods.attentive_clip.settings import AttentiveMasks
from vtoken.methods.attentive_clip.transformers import AttentiveMaskTransformersCLIP

__all__ = ["AttentiveMaskCLIP", "AttentiveMaskLoss", "AttentiveMaskTransformersCLIP", "AttentiveMasks", "MultiViewCrop"]
