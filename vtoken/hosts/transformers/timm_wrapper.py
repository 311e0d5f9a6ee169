"""transformers' door to timm models: the tower behind it is the adapter's of whatever timm model it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vtoken.core.host import HostAdapter, find_adapter, keys_of
from vtoken.core.method import AttentionMethod, BlockMethod, Methods
from vtoken.core.spec import HostSpec
from vtoken.core.watch import Watch
from vtoken.errors import UnsupportedModelError


class TimmWrapperAdapter(HostAdapter):
    """TimmWrapperModel, TimmWrapperForImageClassification."""

    name = "transformers TimmWrapper models over such a timm tower"
    package = "transformers"
    serves = (BlockMethod, AttentionMethod)

    def matches(self, model: nn.Module) -> bool:
        """By the module of the class."""
        return any(module == "timm_wrapper" for module, _ in keys_of(type(model))) and hasattr(model, "timm_model")

    def tower(self, model: nn.Module) -> Any:
        """The timm model, which alone is patched."""
        if not self.matches(model):
            raise UnsupportedModelError(f"a {type(model).__name__} is no TimmWrapper model")
        return model.timm_model

    def spec(self, model: nn.Module) -> HostSpec:
        """The timm model's measures."""
        tower = self.tower(model)
        return replace(find_adapter(tower).spec(tower), name=type(model).__name__)

    def grid(self, model: nn.Module, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patch rows and columns."""
        tower = self.tower(model)
        return find_adapter(tower).grid(tower, img_size)

    def image_size(self, model: nn.Module) -> tuple[int, int]:
        """Height and width that the timm model was built for."""
        tower = self.tower(model)
        return find_adapter(tower).image_size(tower)

    def channels(self, model: nn.Module) -> int:
        """Channels of the timm model's images."""
        tower = self.tower(model)
        return find_adapter(tower).channels(tower)

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The timm model's blocks."""
        tower = self.tower(model)
        return [(f"timm_model.{name}", block) for name, block in find_adapter(tower).blocks(tower)]

    def targets(self, model: nn.Module, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The timm model and its blocks."""
        tower = self.tower(model)
        return find_adapter(tower).targets(tower, methods)

    def run_watched(self, model: nn.Module, watch: Watch, image: Tensor) -> None:
        """In the timm model."""
        tower = self.tower(model)
        find_adapter(tower).run_watched(tower, watch, image)
