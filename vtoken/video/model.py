"""The wrapper that spends a token budget on the frames of a video by their relevance (docs/methods/quota.md 9.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.host import find_adapter
from vtoken.core.options import checked, fixed, held
from vtoken.core.records import VideoRecord
from vtoken.core.trace import current_trace
from vtoken.errors import ConfigError, InputError, VTokenWarning
from vtoken.hosts.video.adapter import VideoAdapter, VideoFeatures, VideoLayout
from vtoken.prompts import calls
from vtoken.video.budget import Budget, Spending, budgets, check_budget, check_whole, per_cell, scores_by_video
from vtoken.video.decouple import Decoupler, IdentityDecoupler
from vtoken.video.prompt import PreparedPrompt, build, check_call, check_placeholders
from vtoken.video.reporting import reports
from vtoken.video.scorers import Scorer, score_frames
from vtoken.video.tokens import resample

_PIXELS = "pixel_values_videos"
Features = VideoFeatures | Sequence[VideoFeatures]


class QuotaVideoModel(nn.Module):
    """A multimodal model whose frames get tokens by their relevance to the question, within one budget per video.

    Holds the model as `model`; every attribute that it does not have itself is the model's. Calls without a video go
    straight to the model. `forward` returns logits of the rebuilt prompt [B, L', V]; `generate` returns the ids that
    the caller passed, followed by the new tokens. Who wants to know what a call did asks for it:
    `with vtoken.tracing(quota) as record: ...`, then `record.video`. Settings are attributes, and all but the adapter
    may be changed between calls.

    Args:
        model: transformers LlavaOnevision, LlavaNextVideo, Qwen2VL, Qwen2_5_VL, Qwen3VL or VideoLlama3
            ...ForConditionalGeneration, or one that an adapter of yours knows; plain or compiled.
        budget: tokens of each video: a whole number, a share of what the unmodified model would spend (a float in
            (0, 1]), None for 64 frames' worth of that, or a list with one of these per video.
        mode: how a frame becomes so many tokens: "bilinear", "pool", "merge" or "stride", see `vtoken.ops.assign`.
        min_tokens, max_tokens: bounds per frame. By default 0 (1 where frames have runs of their own in the prompt) and
            all of the frame's features (for "merge" the model's own tokens per frame).
        power: of the scores; see `vtoken.ops.allocate_tokens`.
        scorer, decoupler: used for calls that bring `frames` and a `query` but no scores; by default no scorer, and a
            decoupler that leaves the question as it is.
        adapter: "auto", or a `vtoken.hosts.video.VideoAdapter`.
        count_separators: whether newlines count towards the budget.
        vision_chunk: frames in one run of the tower; None means all of a call. Where a call needs several runs, the
            last bits of features may differ from the model's own.
        rounding: "exact", or "floor" as the published code: shares of the budget rounded down, without bounds.
        shape: of a frame's rows for "bilinear" and "pool": "exact", or "floor" as the published code: at most the
            frame's tokens, in nearly square grids.

    Raises:
        UnsupportedModelError: if no adapter knows the model.
        ConfigError: if a setting is wrong.

    Source: arXiv 2503.08689; exact budgets are docs/methods/quota.md 6.
    """

    _vtoken_records = True

    budget = checked("budget", lambda _, value: check_budget(value))
    vision_chunk = checked("vision_chunk", lambda _, value: check_whole("vision_chunk", value, 1))
    mode = held("spending", "mode")
    min_tokens = held("spending", "min_tokens")
    max_tokens = held("spending", "max_tokens")
    power = held("spending", "power")
    count_separators = held("spending", "count_separators")
    rounding = held("spending", "rounding")
    shape = held("spending", "shape")
    adapter = fixed("adapter")

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: Budget | Sequence[Budget] = None,
        mode: str = "bilinear",
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        power: float = 2.0,
        scorer: Scorer | None = None,
        decoupler: Decoupler | None = None,
        adapter: VideoAdapter | str = "auto",
        count_separators: bool = False,
        vision_chunk: int | None = 32,
        rounding: str = "exact",
        shape: str = "exact",
    ) -> None:
        super().__init__()
        self.budget = budget
        self.vision_chunk = vision_chunk
        known = _adapter(model, adapter)
        self._fixed = {"adapter": known}
        floor = 1 if known.runs == "per_frame" else 0
        self.spending = Spending(
            mode, min_tokens, max_tokens, power, count_separators, known.newline, floor, rounding, shape
        )
        self.model = model
        self.scorer: Any = scorer
        self.decoupler = IdentityDecoupler() if decoupler is None else decoupler
        self._warned = False

    def __setattr__(self, name: str, value: Any) -> None:
        # Past nn.Module: a scorer that is a module is not part of the model's state.
        if name in ("scorer", "decoupler"):
            needs = "score" if name == "scorer" else "decouple"
            if not callable(getattr(value, needs, None)) and not (name == "scorer" and value is None):
                raise ConfigError(f"QuotaVideoModel({name}={value!r}): must have a method {needs}; see vtoken.video")
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        if name == "last_report":
            raise AttributeError("nothing is remembered of a call; use vtoken.tracing(model) and its record.video")
        if name in ("base_model", "get_decoder", "language_model"):
            raise AttributeError(
                f"{name} of a QuotaVideoModel would run past its budget (a fused loss takes it so); call the wrapper "
                f"itself, or ask the model inside: .model.{name}"
            )
        return getattr(self.model, name)

    def unwrap(self) -> nn.Module:
        """The model, which was never changed."""
        return self.model

    def forward(
        self,
        *args: Any,
        frame_scores: Any = None,
        query: str | Sequence[str] | None = None,
        frames: Sequence[Any] | None = None,
        features: Features | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward on the rebuilt prompt; see `prepare` for the arguments."""
        given = calls.by_name(self._core.forward, args, kwargs)
        if not self._has_video(given, frame_scores, frames, features):
            return self.model(*args, **kwargs)
        # Eagerly, also in a compiled wrapper: it hangs on values. As a decorator, disable would load the compiler.
        prepare = torch.compiler.disable(self.prepare) if torch.compiler.is_compiling() else self.prepare
        prepared = prepare(frame_scores=frame_scores, query=query, frames=frames, features=features, **given)
        target, call = self.adapter.handed_over(self._core, dict(prepared))
        ids = call.pop("input_ids") if "inputs_embeds" in call else call["input_ids"]
        out = (self.model if target is self._core else target)(**call)
        calls.mark(calls.cache_of(out), ids, self.adapter.placeholder_id(self._core), "video")
        return out

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        frame_scores: Any = None,
        query: str | Sequence[str] | None = None,
        frames: Sequence[Any] | None = None,
        features: Features | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's `generate` on the rebuilt prompt; see `prepare` for the arguments.

        Returns:
            As the model does, with the caller's ids in front of the new tokens. That is also what stopping criteria,
            logits processors and streamers see; caches, scores and attentions are of the rebuilt prompt.
        """
        model: Any = self.model
        given = calls.by_name(self._core.generate, args, kwargs)
        ids: Any = given.get("input_ids", given.get("inputs"))
        token_id = self.adapter.placeholder_id(self._core)
        if not self._has_video(given | {"input_ids": ids}, frame_scores, frames, features):
            calls.check_cache(calls.cache_of(given), ids, token_id, "video")
            return model.generate(*args, **kwargs)
        given = {name: value for name, value in given.items() if name != "inputs"} | {"input_ids": ids}
        if given.get("attention_mask") is None and isinstance(ids, Tensor):
            given["attention_mask"] = calls.inferred_mask(self._core, given, ids)
        from vtoken.prompts.generation import FullPrompt, check_way, generate_on  # only with a model of transformers

        check_way(self._core, given)
        if self.adapter.inject == "embeds":
            calls.refuse_chunks(self._core, given, "cannot be combined with a rebuilt prompt")
        prepared = self.prepare(
            frame_scores=frame_scores, query=query, frames=frames, features=features, padding_side="left", **given
        )
        short = prepared["input_ids"]
        target, call = self.adapter.handed_over(self._core, dict(prepared))
        calls.count_from_full(self._core, call, ids.shape[1])
        full = FullPrompt(target, ids, given.get("attention_mask"), short.shape[1])
        out = generate_on(target.generate, call, full)
        returned = calls.cache_of(out)
        calls.mark(calls.cache_of(call) if returned is None else returned, short, token_id, "video")
        return calls.with_prompt(out, ids, short.shape[1])

    def prepare(
        self,
        *,
        frame_scores: Any = None,
        query: str | Sequence[str] | None = None,
        frames: Sequence[Any] | None = None,
        features: Features | None = None,
        padding_side: str = "right",
        **inputs: Any,
    ) -> PreparedPrompt:
        """Encode the videos of a call, unless their features are given, and rebuild its prompt around their tokens.

        Args:
            frame_scores: relevance of every frame, [T] for one video, else a list with one [T] per video; any scale, at
                least 0. Where the model merges frames in time, one per frame or one per merged cell.
            query: the question, or one per video; used with the scorer if there are no scores.
            frames: what the scorer looks at: the frames of the video, or a list of those per video.
            features: from `encode_video`, in place of pixels; a list if there are several videos.
            padding_side: for rows that become shorter than others: "right", or "left" to generate from.
            inputs: what the processor returned.

        Returns:
            Arguments for the model, and under `reports` what every frame was given.

        Raises:
            InputError, ShapeError: if scores, placeholders and pixels do not belong together.
            ConfigError: if a budget cannot be spent.
        """
        core, adapter = self._core, self.adapter
        given = {name: value for name, value in inputs.items() if value is not None}
        check_call(adapter, core, given)
        known = None
        if features is not None:
            each = [features] if isinstance(features, VideoFeatures) else features
            known = [f.to(given["input_ids"].device) for f in each]
            given = _known_inputs(known) | given
        layouts = adapter.layouts(core, given) if known is None else [f.layout for f in known]
        check_placeholders(given["input_ids"], adapter.placeholder_id(core), layouts)
        scores = self._scores(layouts, frame_scores, query, frames)
        spent = budgets(self.budget, layouts)
        counts = [self.spending.counts(*each) for each in zip(scores, spent, layouts, strict=True)]
        encoded = adapter.encode(core, given, self.vision_chunk) if known is None else known
        videos = [
            resample(f, c, self.spending.mode, adapter.pooling, self.spending.shape)
            for f, c in zip(encoded, counts, strict=True)
        ]
        call = build(adapter, core, given, encoded, videos, padding_side=padding_side)
        scoring = None if frame_scores is None and self.scorer is not None else 0
        call.reports = reports(
            core, adapter, given, call, layouts, scores=scores, spent=spent, videos=videos, scoring=scoring
        )
        record = current_trace(self)
        if record is not None:
            record.record_video(VideoRecord(call.reports, call.index, call["input_ids"]))
        return call

    def encode_video(self, **inputs: Any) -> VideoFeatures:
        """Run the tower on one video, once for any number of questions about it.

        Args:
            inputs: what the processor returned; the prompt is not read.

        Raises:
            InputError: if there is not exactly one video.
        """
        core = self._core
        if inputs.get(_PIXELS) is None:
            raise InputError(f"encode_video needs {_PIXELS}")
        self.adapter.ready(core, inputs)
        count = len(self.adapter.layouts(core, inputs))
        if count != 1:
            raise InputError(f"encode_video takes one video, got {count}; call it for each and pass a list of features")
        return self.adapter.encode(core, inputs, self.vision_chunk)[0]

    @property
    def _core(self) -> Any:
        """The model itself where it was compiled."""
        return getattr(self.model, "_orig_mod", self.model)

    def _has_video(self, given: dict[str, Any], frame_scores: Any, frames: Any, features: Any) -> bool:
        """Whether a call is to be prepared; raises InputError for one that has only a part of a video."""
        if given.get(_PIXELS) is not None or features is not None:
            if given.get(_PIXELS) is not None and features is not None:
                raise InputError(f"pass {_PIXELS} or features, not both")
            return True
        if frame_scores is not None or frames is not None:
            raise InputError(f"frame_scores or frames came without {_PIXELS} or features")
        ids = given.get("input_ids")
        outputs = (given.get("mm_encoder_outputs") or {}).get("video")
        if outputs is not None and not calls.is_chosen(outputs):
            warnings.warn(
                "a QuotaVideoModel spends its budget on videos that it encodes: this call came with mm_encoder_outputs "
                "and runs without a budget; pass pixel_values_videos, or features of encode_video",
                VTokenWarning,
                stacklevel=3,
            )
        ready = any(given.get(name) is not None for name in ("inputs_embeds", "mm_encoder_outputs"))
        if isinstance(ids, Tensor) and not ready and not calls.is_filled(calls.cache_of(given)):
            count = int((ids == self.adapter.placeholder_id(self._core)).sum())
            if count:
                raise InputError(f"{count} video placeholders in the prompt, but no {_PIXELS} and no features")
        return False

    def _scores(
        self, layouts: Sequence[VideoLayout], frame_scores: Any, query: Any, frames: Any
    ) -> list[list[float]]:  # fmt: skip
        """Scores of the cells of every video."""
        if frame_scores is None:
            if self.scorer is None:
                self._warn_uniform()
                return [[1.0] * layout.cells for layout in layouts]
            frame_scores = self._scored(layouts, query, frames)
        found = scores_by_video(frame_scores, len(layouts))
        return [per_cell(s, layout, i) for i, (s, layout) in enumerate(zip(found, layouts, strict=True))]

    def _warn_uniform(self) -> None:
        """Once for every wrapper."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "QuotaVideoModel has neither frame_scores nor a scorer: the budget is spread evenly over the frames",
                VTokenWarning,
                stacklevel=3,
            )

    def _scored(self, layouts: Sequence[VideoLayout], query: Any, frames: Any) -> list[Tensor]:
        count = len(layouts)
        if frames is None or query is None:
            raise InputError("the scorer needs frames=... and query=...; or pass frame_scores=...")
        videos = list(frames) if _holds_videos(frames) else [frames]
        queries = [query] * count if isinstance(query, str) else list(query)
        if len(videos) != count or len(queries) != count:
            raise InputError(
                f"frames for {len(videos)} video(s) and {len(queries)} question(s), but there are {count} video(s)"
            )
        for i, (video, layout) in enumerate(zip(videos, layouts, strict=True)):  # before the scorer's work
            per_cell([0.0] * len(video), layout, i)
        pairs = zip(videos, queries, strict=True)
        return [score_frames(self.scorer, list(video), self.decoupler.decouple(asked)) for video, asked in pairs]


def _adapter(model: nn.Module, adapter: VideoAdapter | str) -> VideoAdapter:
    if isinstance(adapter, VideoAdapter):
        return adapter
    if adapter != "auto":
        raise ConfigError(f'adapter={adapter!r}: must be "auto" or a vtoken.hosts.video.VideoAdapter')
    found = find_adapter(getattr(model, "_orig_mod", model), "video")
    assert isinstance(found, VideoAdapter)
    return found


def _known_inputs(features: Sequence[VideoFeatures]) -> dict[str, Any]:
    names = dict.fromkeys(name for f in features for name in f.inputs)
    return {name: torch.cat([f.inputs[name] for f in features]) for name in names}


def _holds_videos(frames: Any) -> bool:
    """Whether these are videos, not frames: lists of images, or arrays of more dimensions than an image has."""
    first = frames[0] if len(frames) else None
    return isinstance(first, (list, tuple)) or getattr(first, "ndim", 0) > 3
