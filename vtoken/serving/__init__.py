"""Engines that serve: settings that travel in an engine's own, and what is refused before it starts."""

from vtoken.serving.check import check
from vtoken.serving.handover import image_embeds

__all__ = ["check", "image_embeds"]
