"""What the engine must know of a family of multimodal models: where visuals lie in a prompt, and their features."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtoken.core.apply import build_methods
from vtoken.core.config import MethodConfig
from vtoken.core.host import Host, HostAdapter, keys_of
from vtoken.core.method import Methods, PromptMethod
from vtoken.core.patch import base_of, forward_is_replaced
from vtoken.core.spec import HostSpec, ImageTokens
from vtoken.core.visual import Encoded, Needs, TowerFacts, Visual, length_of
from vtoken.errors import ConfigError, InputError, UnsupportedModelError
from vtoken.prompts.budget import asked_of, likely_methods
from vtoken.prompts.calls import fresh, refuse_chunks, setting
from vtoken.prompts.entry import InnerMixin, PromptMixin
from vtoken.prompts.shrink import placeholders_in


class Family(HostAdapter):
    """Knowledge of one family. Subclass it and pass the class to `vtoken.register_adapter` to support your own.

    The arguments `given` of its methods are those of the model's own call, by name. Tensors of pixels are never looked
    into before `encode`.
    """

    part = "prompt"
    package = "transformers"
    serves = (PromptMethod,)
    #: Classes that it knows: module of transformers.models and class name.
    models: ClassVar[frozenset[tuple[str, str]]] = frozenset()
    #: What it shortens, of "image" and "video".
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    #: Axes along which the model numbers tokens: 1 or 3.
    axes: ClassVar[int] = 1
    #: Rules for separators that mean something here; a family without any takes all.
    newlines: ClassVar[frozenset[str]] = frozenset({"row", "all", "none"})
    #: Arguments that say how visuals are encoded; they leave the call once these have become features.
    side: ClassVar[tuple[str, ...]] = ()
    #: Those of them that positions are numbered by, with a row for every video; a video's features keep them.
    numbering: ClassVar[tuple[str, ...]] = ()

    def supported(self) -> str:
        """Its classes."""
        return f"transformers {', '.join(sorted(name for _, name in self.models))}" if self.models else self.name

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of one of the classes, or a subclass of one."""
        return any(key in self.models for key in keys_of(base_of(type(model))))

    # What a family must say.

    def facts(self, model: Any, given: dict[str, Any]) -> TowerFacts:
        """The tower, as it would run in this call."""
        raise NotImplementedError

    def refuse(self, model: Any, given: dict[str, Any], needs: Needs) -> None:
        """Raise, before anything runs, what cannot be served: UnsupportedModelError, ConfigError or InputError."""

    def layout(self, model: Any, given: dict[str, Any]) -> list[Visual]:
        """The visuals of a call, those of one kind in the order of its placeholders; never from pixel values."""
        raise NotImplementedError

    def encode(self, model: Any, given: dict[str, Any], visuals: Sequence[Visual], needs: Needs) -> Encoded:
        """Run the model's own towers and projectors, watched as the method needs.

        Args:
            visuals: those of one kind in the call, in the order of layout; entries of what comes back are like them.
        """
        raise NotImplementedError

    def visual(self, model: Any, size: tuple[int, int], configs: Sequence[MethodConfig] = ()) -> Visual:
        """One image of `size` (height, width) pixels, with such settings applied to the tower."""
        raise NotImplementedError

    # What most families leave as it is.

    def token_ids(self, model: Any) -> dict[str, int]:
        """Ids of placeholders by kind."""
        config, found = model.config, {}
        for kind in self.kinds:
            names = (f"{kind}_token_id", f"{kind}_token_index")
            found[kind] = int(next(getattr(config, n) for n in names if getattr(config, n, None) is not None))
        return found

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """Rows [k, C0] from in front of the projector, projected; only where `TowerFacts.per_token` holds."""
        projected: Tensor = model.model.multi_modal_projector(rows)
        return projected

    def finish(self, model: Any, rows: Tensor, visual: Visual) -> Tensor:
        """What is done to rows [k, C] that were made of `Seen.native`, before they are what the model gets."""
        return rows

    def outputs(self, model: Any, output: Any, levels: Sequence[Sequence[Tensor]]) -> Any:
        """A fresh output object like `output` that holds, of every level, these rows of every visual of a kind."""
        fields = {"pooler_output": like(output.pooler_output, levels[0])}
        if len(levels) > 1:
            fields["deepstack_features"] = [
                like(old, level) for old, level in zip(output.deepstack_features, levels[1:], strict=True)
            ]
        return fresh(output, **fields)

    def places(
        self, model: Any, given: dict[str, Any], *, generating: bool
    ) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
        """Positions [3, B, L] of the full prompt and the model's own offset [B, 1] of what follows; None: one axis."""
        return None

    def go_on(self, model: Any, offset: Tensor) -> None:
        """Let a model with three axes know the offset [B, 1] with which text behind a cached prompt is numbered."""

    def record_grid(self, model: Any, given: dict[str, Any], visual: Visual) -> tuple[int, int] | None:
        """Rows and columns of the first visual, for pictures of what was kept."""
        return visual.cells[0].grid

    def hand_over(self, model: Any, call: dict[str, Any], *, generating: bool) -> tuple[Any, dict[str, Any]]:
        """What is called in the model's place, and with what: features enter as `mm_encoder_outputs` where they can."""
        features, embeds = call.pop("features"), call.get("inputs_embeds")
        # Without a cache every step looks for placeholders again, and one that was generated would count.
        anew = generating and self.axes == 1 and setting(model, call, "use_cache") is False
        anew = anew and "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters
        if embeds is None and takes_outputs(model) and not anew:
            return model, call | {"mm_encoder_outputs": features}
        if generating and embeds is None and "prepare_inputs_for_generation" in vars(model):
            # peft's tuned prompts put it there. It embeds the ids anew, and image features would be lost.
            raise UnsupportedModelError(
                f"generate of a {type(model).__name__} whose prepare_inputs_for_generation was replaced (as by peft's "
                "prompt tuning) cannot take image features here: this transformers' generate has no "
                "mm_encoder_outputs; 5.18 has. Upgrade it, or vtoken.remove(model) before"
            )
        table, token_ids = model.get_input_embeddings(), self.token_ids(model)
        ids: Any = call.get("input_ids")
        if embeds is None:
            embeds = table(ids)
        else:
            ids = placeholders_in(embeds, table, *token_ids.values())
        for kind, output in features.items():
            rows, at = rows_of(output), (ids == token_ids[kind]).unsqueeze(-1).to(embeds.device)
            embeds = embeds.masked_scatter(at, rows.to(embeds.device, embeds.dtype))
        call["inputs_embeds"] = embeds
        if generating:
            refuse_chunks(
                model, call, "needs a prompt of ids and a transformers whose generate takes mm_encoder_outputs"
            )
        if not generating or call["input_ids"] is None:
            del call["input_ids"]
        return model, call

    # What follows from it.

    def check(self, model: nn.Module, methods: Methods) -> None:
        """The method must fit the tower, and its positions and separators the model."""
        method: PromptMethod = methods[PromptMethod]
        if not method.kinds & set(self.kinds):
            raise ConfigError(
                f"{type(method).__name__} shortens {' and '.join(sorted(method.kinds))}s, which vtoken does not know "
                f"in {type(model).__name__}"
            )
        self.refuse(model, {}, method.needs(self.facts(model, {})))
        if method.positions == "compact" and self.axes == 3:
            raise ConfigError(
                f"positions='compact' numbers tokens along one axis, {type(model).__name__} along three; use "
                "'original' or 'auto'"
            )
        if method.newline not in self.newlines:
            raise ConfigError(f"{type(model).__name__} has no newlines that newline={method.newline!r} could speak of")

    def original(self, method: PromptMethod) -> bool:
        """Whether kept tokens keep their places."""
        return self.axes == 3 or method.positions == "original"

    def targets(self, model: nn.Module, methods: Methods) -> list[tuple[nn.Module, type, dict[str, Any]]]:
        """The model, and the one inside for those who run it alone."""
        inner: Any = model.model
        method: PromptMethod = methods[PromptMethod]
        kinds = tuple(kind for kind in self.kinds if kind in method.kinds)
        return [(model, PromptMixin, {"_vtoken_family": self}), (inner, InnerMixin, {"_vtoken_kinds": kinds})]

    def check_known(self, model: Any, *more: tuple[Any, str]) -> None:
        """Raise UnsupportedModelError if a method that a call goes through was replaced on an instance."""
        parts: list[tuple[Any, str]] = [(model, type(model).__name__), (model.model, "model"), *more]
        for module, where in parts:
            own = forward_is_replaced(module)
            if own or any(entry in vars(module) for entry in ("generate", "get_image_features", "get_video_features")):
                raise UnsupportedModelError(
                    f"cannot shorten the prompts of {type(model).__name__}: a method of {where} was replaced on the "
                    "instance. The model was left as it was."
                )

    def count(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> ImageTokens:
        """Tokens of one image of `size` pixels, from its layout and the method's own count."""
        visual, method = self.visual(model, size, configs), self.method(model, configs)
        crops, rows = self.crops(model, size), visual.cells[0].tokens + visual.fixed
        if method is None or "image" not in method.kinds:
            return ImageTokens(crops, rows, visual.length, visual.length)
        held = getattr(model.__dict__.get("_vtoken"), "configs", ())
        own = all(any(c is h for h in held) for c in configs if c.part == "prompt")
        likely = likely_methods(method, asked_of(model) if own else {})
        lengths = [length_of(visual, min(m.count(visual, {}), visual.content), m.newline) for m in likely]
        return ImageTokens(crops, rows, visual.length, max(lengths)[0], len(lengths) == 1 and lengths[0][1])

    def crops(self, model: Any, size: tuple[int, int]) -> int:
        """Images that the tower sees for one of `size` pixels."""
        return 1

    def tower_macs(self, model: Any, size: tuple[int, int]) -> tuple[int, int] | None:
        """Multiply-adds of the tower on one image or crop, without and with methods in it; None: counted by running."""
        return None

    def projector_macs(self, model: Any) -> int:
        """Multiply-adds per token between tower and language model."""
        return linear_macs(model.model.multi_modal_projector)

    def scoring_macs(self, model: nn.Module, configs: Sequence[MethodConfig], size: tuple[int, int]) -> int:
        """Multiply-adds that reading the attention of one image or crop takes."""
        return 0

    def measured(
        self, model: Any, blocks: Sequence[Any], width: int, heads: int, *, prefix: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> HostSpec:  # fmt: skip
        """The measures of a tower of `width` channels; without a grid it takes images of any size.

        Args:
            prefix: a class token in front, or none.
            grid: patch rows and columns of its one size of images.
        """
        return HostSpec(
            name=type(model).__name__,
            depth=len(blocks),
            width=width,
            num_heads=heads,
            head_dim=width // heads,
            num_prefix=prefix,
            grid=grid or (1, 1),
            pooling="",
            position="absolute" if grid else "rotary",
            fixed_size=grid is not None,
            class_token=prefix > 0,
        )

    def method(self, model: nn.Module, configs: Sequence[MethodConfig]) -> Any:
        """What the settings of the prompt, among these, make; None if there are none."""
        prompt = tuple(c for c in configs if c.part == "prompt")
        return build_methods(Host(self, model, self.spec(model)), prompt)[PromptMethod] if prompt else None


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds of all linear layers for one row."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def like(old: Any, rows: Sequence[Tensor]) -> Any:
    """Rows [k_i, C] of several visuals in the container that `old` is: a list, a tuple, or one tensor.

    Unequal counts in one tensor are [1, sum, C]: the models flatten it, and only its size is checked.
    """
    if not isinstance(old, Tensor):
        return type(old)(rows)
    if old.dim() == 2:
        return torch.cat(list(rows))
    if len({len(r) for r in rows}) == 1 and old.dim() == 3:
        return torch.stack(list(rows))
    return torch.cat(list(rows)).unsqueeze(0)


def rows_of(output: Any) -> Tensor:
    """Tokens [N, C] of all visuals of an output, one after the other."""
    rows = output.pooler_output
    return rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat([r.flatten(0, -2) for r in rows])


def takes_outputs(model: Any) -> bool:
    """Whether this release's model takes features that are ready; then its generate encodes visuals itself."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def named_for(function: Any, given: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Of a call's arguments those among `names` that a function takes."""
    takes = inspect.signature(function).parameters
    return {name: given[name] for name in names if name in takes and given.get(name) is not None}


def need(model: Any, given: dict[str, Any], name: str) -> Any:
    """An argument that the processor returns; raises InputError if it is missing."""
    if given.get(name) is None:
        raise InputError(f"{type(model).__name__} needs {name} with its images; pass all that the processor returns")
    return given[name]
