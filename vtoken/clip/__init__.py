"""Attentive-mask training of CLIP models (arXiv 2212.08653): the wrapper, its losses and its crops."""

from vtoken.clip.crop import MultiViewCrop
from vtoken.clip.loss import AttentiveMaskLoss
from vtoken.clip.model import AttentiveMaskCLIP

__all__ = ["AttentiveMaskCLIP", "AttentiveMaskLoss", "MultiViewCrop"]
