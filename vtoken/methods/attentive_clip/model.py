"""CLIP training in which an averaged teacher chooses the patches that the student sees (arXiv 2212.08653)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtoken import checks
from vtoken.core.watch import Watch
from vtoken.core.wrapper import Wrapper, setting, settings_from
from vtoken.errors import ConfigError, ShapeError, UnsupportedModelError
from vtoken.methods.attentive_clip import cost, fit, heads
from vtoken.methods.attentive_clip.ema import EmaTeacher, attach, momentum_after
from vtoken.methods.attentive_clip.follow import StepWatch
from vtoken.methods.attentive_clip.masking import by_view, scores_of_units, shrunk, token_rows
from vtoken.methods.attentive_clip.select import patches_of
from vtoken.methods.attentive_clip.settings import AttentiveMasks
from vtoken.methods.attentive_clip.towers import pair_of


class AttentiveMaskCLIP(Wrapper):
    """A CLIP whose image tower is trained on the patches that an averaged copy of it attends to.

    In train mode each image is looked at by the teacher, a moving average of the image tower; the class token's
    attention there says which patches the student gets. In eval mode it is the wrapped model. Call
    `attach_ema(optimizer)` once (or `update_ema()` after each optimiser step). Where neither is called, as in a
    training script of others, the teacher follows by itself: weights that changed after a backward pass are one step,
    taken over when the next training forward, or anything else, needs the teacher (with a compiled forward at the next
    backward, so that masks lag one step behind). An optimiser that runs several backward passes in a step, as LBFGS
    does, must be attached. Wrap first, then DDP or compile. Unknown attributes are those of the wrapped model.

    Every setting is an attribute; `vtoken.config_of` gives them all, `vtoken.configure` changes several at once. Those
    that shape the heads and the teacher (`simclr_weight`, `byol_weight`, `hidden_dim`, `out_dim`, `head_norm`,
    `ema_text`) and `freeze_patch_embed` stay as they were built; the others may change between steps.

    On cluttered images, trained from scratch, the attention of the first steps means nothing and "topk" can lock in on
    the background: give `warmup_steps`, or use mode "mix".

    A model of transformers is called in its own words and returns its own output, loss included: see
    `AttentiveMaskTransformersCLIP`, which is what this class makes of one.

    Args:
        model: an open_clip CLIP or CustomTextCLIP, or a CLIPModel, SiglipModel or their like of transformers; not
            copied, and usable on its own. Its image tower has a class token, or, as SigLIP's, an attention pool with
            one query, whose attention to the patches then counts. In open_clip it is a VisionTransformer, or a timm
            VisionTransformer as trunk.
        config: the settings.
        generator: of the random modes; None is torch's own, which is also the one that compiles. An attribute that may
            change, and no setting.
        settings: instead of `config`, settings of `AttentiveMasks` by name, such as `keep_ratio=0.5`.

    Raises:
        UnsupportedModelError: if the model is not understood, with the reason.
        ConfigError: for values out of range or that do not fit the model, and for both ways to give settings at once.

    Example:
        >>> import open_clip, torch, vtoken
        >>> tower = dict(layers=2, width=64, head_width=32, patch_size=16, image_size=64)
        >>> model = open_clip.CLIP(32, tower, dict(layers=1, width=64, heads=2), output_dict=True)
        >>> clip = vtoken.AttentiveMaskCLIP(model, keep_ratio=0.5).train()
        >>> out = clip(torch.randn(2, 3, 64, 64), open_clip.tokenize(["a shoe", "a bag"]))
        >>> clip.unwrap() is model, vtoken.config_of(clip) == vtoken.AttentiveMasks(keep_ratio=0.5)
        (True, True)

    Source: arXiv 2212.08653.
    """

    ema_step: Tensor
    teacher: Any

    _settings: AttentiveMasks
    _fixed = frozenset(
        {"simclr_weight", "byol_weight", "hidden_dim", "out_dim", "head_norm", "ema_text", "freeze_patch_embed"}
    )

    keep_ratio, mode, block = setting("keep_ratio"), setting("mode"), setting("block")
    top_fraction, temperature, warmup_steps = setting("top_fraction"), setting("temperature"), setting("warmup_steps")
    teacher_scale, momentum, total_steps = setting("teacher_scale"), setting("momentum"), setting("total_steps")
    simclr_weight, byol_weight, outside = setting("simclr_weight"), setting("byol_weight"), setting("outside")
    hidden_dim, out_dim, head_norm = setting("hidden_dim"), setting("out_dim"), setting("head_norm")
    ema_text, freeze_patch_embed = setting("ema_text"), setting("freeze_patch_embed")

    #: Subclasses for models that are called in other words, by the library that the model comes from.
    _by_library: ClassVar[dict[str, type[AttentiveMaskCLIP]]] = {}

    def __init_subclass__(cls, library: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if library:
            AttentiveMaskCLIP._by_library[library] = cls

    def __new__(cls, model: Any = None, *args: Any, **settings: Any) -> Self:
        """An instance of the subclass for the model's library, where that has words of its own."""
        libraries = [base.__module__.partition(".")[0] for base in type(model).__mro__]
        kind: Any = next((cls._by_library[name] for name in libraries if name in cls._by_library), cls)
        if cls is AttentiveMaskCLIP or issubclass(cls, kind):
            return super().__new__(kind if cls is AttentiveMaskCLIP else cls)
        raise UnsupportedModelError(
            f"{cls.__name__} is called in open_clip's words; derive it from {kind.__module__}.{kind.__name__} to train "
            f"a {type(model).__name__}"
        )

    def __init__(
        self,
        model: nn.Module,
        config: AttentiveMasks | None = None,
        *,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = settings_from(type(self).__name__, AttentiveMasks, config, settings)
        self.generator = generator
        #: The adapter of the model's family; it runs the image tower.
        self._host: Any
        self._host, self._pair, self._spec, self._patches = pair_of(model)
        self._patch_size, self._image_size = self._patches.size, self._patches.image_size
        self._steps = 0
        self._adopt(config)

        like = next(getattr(model, self._pair.tower).parameters())
        sizes: dict[str, Any] = {"hidden": config.hidden_dim, "out": config.out_dim, "norm": config.head_norm}
        width, made = self._patches.features, {"device": like.device, "dtype": like.dtype}
        self.model: Any = model
        self.simclr_head = heads.simclr_head(width, **sizes).to(**made) if config.simclr_weight else None
        self.byol_projector = heads.byol_projector(width, **sizes).to(**made) if config.byol_weight else None
        self.byol_predictor = heads.byol_predictor(**sizes).to(**made) if config.byol_weight else None
        self.teacher = EmaTeacher(**self._averaged())
        self.register_buffer("ema_step", torch.zeros((), dtype=torch.int64, device=like.device))
        self._freeze()
        self._watch_steps()

    def _adopt(self, settings: AttentiveMasks) -> None:
        """Make these the settings; raises ConfigError, nothing changed, where they do not fit the tower."""
        if self._image_size is not None:  # else units are those of a call
            settings.block_of(self._spec.grid, max(self._patch_size))
        fit.check_scale(settings.teacher_scale, self._image_size, self._patch_size)
        layers = fit.chosen_layers(settings.layers, self._spec.depth, self._patches.pool_query)
        super()._adopt(settings)
        self._layers = layers
        self._count_steps(self._steps)  # another warm-up counts from the step that has been reached

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks of the teacher whose attention counts, by number; set as the setting is given.

        The number behind the last block is the attention pool's, where that has the only class query.
        """
        return self._layers

    @layers.setter
    def layers(self, value: Any) -> None:
        self._change({"layers": value})

    @property
    def generator(self) -> torch.Generator | None:
        """Of the random modes; None is torch's own."""
        return self._generator

    @generator.setter
    def generator(self, value: torch.Generator | None) -> None:
        if value is not None and not isinstance(value, torch.Generator):
            raise ConfigError(f"generator={value!r} must be a torch.Generator, or None for torch's own")
        self._generator = value

    @property
    def output_dict(self) -> bool:
        """The wrapped model's."""
        return bool(self.model.output_dict)

    @output_dict.setter
    def output_dict(self, value: bool) -> None:
        self.model.output_dict = value

    def __getattr__(self, name: str) -> Any:
        if name in ("teacher", "ema_step"):  # whoever reads them finds all steps taken over
            self._follow()
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["model"], name)

    def forward(
        self,
        image: fit.Image | None = None,
        text: Tensor | None = None,
        *,
        teacher_image: Tensor | None = None,
        view_boxes: Tensor | None = None,
        teacher_boxes: Tensor | None = None,
    ) -> Any:
        """Features of masked images and of texts.

        Args:
            image: [B, 3, H, W], or a list of V views of that shape.
            text: token ids [B, L].
            teacher_image: what the teacher sees, [B, 3, Ht, Wt]; None: the first view.
            view_boxes: (top, left, height, width) of the views in source pixels, [B, V, 4].
            teacher_boxes: of the teacher's image, [B, 4]. Without both boxes, teacher and all views must show the same
                crop. No flip may differ between them.

        Returns:
            In eval mode or without images what the wrapped model returns. Else a dict: `image_features` [B, E], or
            [B, V, E] of several views, `text_features`, `logit_scale`, `logit_bias` if the model has one, `simclr`
            [B, V, D], `byol` [B, V, D] and `byol_target` [B, D] of the heads that there are. With one view, no heads
            and `output_dict` false the tuple of the wrapped model.

        Raises:
            ShapeError, ConfigError: if views, teacher image and boxes do not fit each other or the settings.
        """
        if image is None or not self.training:
            return self.model(fit.single(image), text)
        views, images, rows, target = self._masked_views(
            image, teacher_image, view_boxes, teacher_boxes, self._image_size
        )  # fmt: skip
        pooled, projected = self._features(self.model, images, rows)
        if projected.dim() != 2:
            raise ShapeError(f"the image tower gives features {tuple(projected.shape)}; CLIP training needs [B, E]")
        features = F.normalize(projected, dim=-1)
        out = {
            "image_features": features if views == 1 else by_view(features, views),
            "text_features": None if text is None else self.model.encode_text(text, normalize=True),
            "logit_scale": self.model.logit_scale.exp(),
        }
        if self.model.logit_bias is not None:
            out["logit_bias"] = self.model.logit_bias
        heads = self._heads(pooled, views, target)
        return tuple(out.values()) if views == 1 and not heads and not self.model.output_dict else out | heads

    def _masked_views(
        self,
        image: fit.Image,
        teacher_image: Tensor | None,
        view_boxes: Tensor | None,
        teacher_boxes: Tensor | None,
        size: tuple[int, int] | None,
    ) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
        """What a training step needs of its images, once they are checked.

        Args:
            image, teacher_image, view_boxes, teacher_boxes: as of `forward`.
            size: of images that the tower takes in this call; None: any.

        Returns:
            The number of views V, all of them [V*B, 3, H, W], the rows of the student's tokens that go on [V*B, T]
            (None: all), and the BYOL target [B, D] (None: there is none).
        """
        self._follow()
        views = [image] if isinstance(image, Tensor) else list(image)
        fit.check_views(views, size, self._patch_size)
        fit.check_teacher(views, teacher_image, view_boxes, teacher_boxes)
        if self.simclr_head is not None and len(views) != 2:
            raise ConfigError(f"simclr_weight > 0 compares two views, but {len(views)} were given")
        rows, target = self._look(views, teacher_image, view_boxes, teacher_boxes)
        return len(views), views[0] if len(views) == 1 else torch.cat(views), rows, target

    def _features(self, model: Any, images: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pooled features of images and what is projected of them; `model` has the image parts by their names."""
        pooled, out = self._host.masked(getattr(model, self._pair.tower), images, rows)
        return pooled, getattr(model, self._pair.projection)(out) if self._pair.projection else out

    def _heads(self, pooled: Tensor, views: int, target: Tensor | None) -> dict[str, Tensor]:
        """What the self-supervised losses compare, by name; empty without heads."""
        out = {}
        if self.simclr_head is not None:
            out["simclr"] = by_view(self.simclr_head(pooled), views)
        if self.byol_predictor is not None and self.byol_projector is not None and target is not None:
            out["byol"] = by_view(self.byol_predictor(self.byol_projector(pooled)), views)
            out["byol_target"] = target
        return out

    @torch.no_grad()
    def _look(
        self,
        views: Sequence[Tensor],
        teacher_image: Tensor | None,
        view_boxes: Tensor | None,
        teacher_boxes: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Rows of the student's tokens that go on, [V*B, T] (None: all), and the BYOL target [B, D]."""
        masked = self.keep_ratio < 1 and not self._warming_up
        scored, byol = masked and self.mode != "random", self.byol_projector is not None
        scores = target = None
        if scored or byol:
            image = views[0] if teacher_image is None else teacher_image
            scores, pooled = self._teach(image, self.layers if scored else (), stop=not byol)
            target = self.teacher.byol_projector(pooled) if byol else None
        if not masked:
            return None, target
        grid = self._grid_of(views[0])
        block = self._block_of(grid)
        if scores is None:  # random: only the shape counts
            units = torch.empty(len(views) * len(views[0]), grid[0] * grid[1] // block**2, device=views[0].device)
        else:
            units = scores_of_units(scores, grid, block, len(views), view_boxes, teacher_boxes, self.outside)
        return token_rows(self._settings.choose(units, self.generator), grid, block, self._spec.num_prefix), target

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self._patch_size[0], images.shape[3] // self._patch_size[1]

    def _block_of(self, grid: tuple[int, int]) -> int:
        return self._settings.block_of(grid, max(self._patch_size))

    def _teach(self, image: Tensor, layers: Collection[int], *, stop: bool) -> tuple[Tensor | None, Tensor]:
        """Relevance [B, h, w] of the patches that the teacher sees, and its pooled features."""
        image = shrunk(image.float(), self.teacher_scale, self._patch_size, self._image_size)
        grid = self._grid_of(image)
        watch = Watch(layers, stop=stop)
        pooled = self._host.masked(getattr(self.teacher, self._pair.tower), image, None, watch)[0]
        if not layers:
            return None, pooled
        # Patches come last; a pool may be given them alone.
        scores = watch.scores(watch.layers[-1], "mean")[0][:, -grid[0] * grid[1] :]
        return scores.unflatten(1, grid), pooled

    @torch.no_grad()
    def score(self, images: Tensor) -> Tensor:
        """How much the teacher's class token attends to each patch, [B, h, w] float32; images [B, 3, H, W].

        Each map sums to a little less than 1: the rest is what prefix tokens get. `teacher_scale` applies.
        """
        scores = self._teach(images, self.layers, stop=True)[0]
        assert scores is not None  # there is always a layer
        return scores

    @torch.no_grad()
    def select(self, scores: Tensor) -> Tensor:
        """The patches that the settings keep for relevance maps [B, h, w], ascending indices [B, K]."""
        if scores.dim() != 3:
            raise ShapeError(f"expected relevance maps [B, h, w], got {tuple(scores.shape)}")
        grid = self._spec.grid if self._image_size is not None else (scores.shape[1], scores.shape[2])
        block = self._block_of(grid)
        return patches_of(self._settings.choose(scores_of_units(scores, grid, block), self.generator), grid, block)

    def encode_image(self, image: Tensor, normalize: bool = False, *, ema: bool = False) -> Tensor:
        """Image features [B, E], nothing masked: of the wrapped model, or of the teacher without gradient."""
        if not ema:
            return self.model.encode_image(image, normalize=normalize)
        with torch.no_grad():
            features = self._features(self.teacher, image.float())[1]
            return F.normalize(features, dim=-1) if normalize else features

    def attach_ema(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update the teacher after each step of an optimiser; a step that a gradient scaler skips does not count.

        Raises:
            ConfigError: if it does not train this model, or is attached already.
        """
        self._follow()
        handle = attach(optimizer, self, self._after_step)
        self._stop_watching()
        return handle

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimisers are stepped by the scaler in any case and told whether to do nothing.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not skipped.item():
            self._take_step()

    def update_ema(self) -> None:
        """Move the teacher towards the student, after an optimiser step; from then on it is yours to call."""
        self._stop_watching()
        self._take_step()

    def _take_step(self) -> None:
        self.teacher.update(self._averaged(), self.momentum_at(self._steps + 1))
        self._count_steps(self._steps + 1)
        self.ema_step.fill_(self._steps)

    def _watch_steps(self) -> None:
        """Follow the student until somebody else sees to it."""
        self._watch: StepWatch | None = StepWatch(self, lambda owner: owner._follow())
        self._watch.arm()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _follow(self) -> None:
        """Take over a step that nobody announced."""
        if torch.compiler.is_compiling():
            return
        watch = self.__dict__.get("_watch")
        if watch is None:
            return
        if watch.stepped():
            self._take_step()
        watch.arm()

    def train(self, mode: bool = True) -> Self:
        """As of any module; the teacher stays in eval mode."""
        self._follow()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module: the wrapped model's under "model.", the teacher's, the heads' and `ema_step`."""
        self._follow()
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        return {name: value for name, value in self.__dict__.items() if name != "_watch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_steps()  # a copy has no optimiser yet

    def momentum_at(self, n: int) -> float:
        """Weight of the old average in the update after optimiser step n = 1, 2, ..."""
        return momentum_after(n, self.momentum, self.total_steps)

    def unwrap(self, ema: bool = False) -> Any:
        """The wrapped model; or a copy of it with the teacher's image tower (and text tower with `ema_text`)."""
        if not ema:
            return self.model
        copied = copy.deepcopy(self.model)
        self.teacher.copy_to(self._towers(copied))
        return copied

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def step_macs(
        self,
        batch: int = 1,
        views: int = 1,
        *,
        keep_ratio: float | None = None,
        mode: str | None = None,
        teacher_scale: float | None = None,
    ) -> int:
        """Multiply-adds of a training step by closed form; heads, poolings and projections are not counted.

        Args:
            batch, views: B and V.
            keep_ratio, mode, teacher_scale: other settings than the model's; keep_ratio=1 is a plain CLIP step if there
                is no BYOL head.

        Source: docs/methods/attentive_clip.md 12.
        """
        batch, views = checks.whole("step_macs", "batch", batch, 1), checks.whole("step_macs", "views", views, 1)
        others = {"keep_ratio": keep_ratio, "mode": mode, "teacher_scale": teacher_scale}
        how = self._settings.replace(**{name: value for name, value in others.items() if value is not None})
        teacher = self.byol_projector is not None or (how.keep_ratio < 1 and how.mode != "random")
        text = getattr(self.model, self._pair.text or "text", self.model)
        kept = how.num_kept(self._spec.grid, max(self._patch_size))
        image = cost.image_macs(
            [block for _, block in self._host.blocks(self._tower)], self._patch_embed(), self._spec.grid,
            self._spec.num_prefix, views=views, kept=kept, teacher_scale=how.teacher_scale if teacher else None,
        )  # fmt: skip
        return batch * (image + 3 * cost.text_macs(text))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module, but the teacher (and a frozen patch embedding) stays frozen."""
        super().requires_grad_(requires_grad)
        self._freeze()
        return self

    def _freeze(self) -> None:
        self.teacher.requires_grad_(False)
        if self.freeze_patch_embed:
            self._patch_embed().requires_grad_(False)

    def _patch_embed(self) -> nn.Module:
        return self._tower.get_submodule(self._patches.embed)

    @property
    def _tower(self) -> nn.Module:
        tower: nn.Module = getattr(self.model, self._pair.tower)
        return tower

    def _averaged(self) -> dict[str, Any]:
        """What the teacher averages, by name."""
        heads = {} if self.byol_projector is None else {"byol_projector": self.byol_projector}
        return self._towers(self.model) | heads

    def _towers(self, model: Any) -> dict[str, Any]:
        if not self.ema_text:
            return {name: getattr(model, name) for name in self._pair.image_parts}
        # A CLIP keeps the parts of its text tower beside its image tower.
        own = {n: p for n, p in model.named_parameters(recurse=False) if not n.startswith("logit_")}
        return dict(model.named_children()) | own

    def _count_steps(self, steps: int) -> None:
        # Beside the buffer, because reading that would wait for the device; the flag because a compiled forward guards
        # on what it reads, and the count changes with every step.
        self._steps = steps
        self._warming_up = steps < self.warmup_steps

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._watch is not None:
            self._watch.forget()
        self._count_steps(int(self.ema_step))
