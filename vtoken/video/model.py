"""The wrapper that scores the frames of a video and spends a token budget on them (docs/methods/quota.md 9.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.core.host import HostAdapter, host_of
from vtoken.core.method import PromptMethod
from vtoken.core.records import VideoRecord
from vtoken.core.trace import current_trace
from vtoken.core.visual import Visual
from vtoken.core.wrapper import Wrapper, setting, settings_from
from vtoken.errors import ConfigError, InputError, ShapeError, UnsupportedModelError, VTokenWarning
from vtoken.methods.quota import FrameBudget, QuoTA, per_cell
from vtoken.prompts.budget import asked_of, clues_for
from vtoken.prompts.calls import by_name, cache_of, is_chosen, is_filled
from vtoken.prompts.engine import Prepared, Service, service_of
from vtoken.prompts.entry import check_goes_on, eagerly, forwarded, generated, go_on, with_ids
from vtoken.prompts.family import Family
from vtoken.video.decouple import Decoupler, IdentityDecoupler
from vtoken.video.features import VideoFeatures
from vtoken.video.reporting import reports
from vtoken.video.scorers import Scorer, score_frames

_PIXELS = "pixel_values_videos"
Features = VideoFeatures | Sequence[VideoFeatures]


class PreparedPrompt(dict[str, Any]):
    """Arguments for the model's `generate`, or for its `forward` without `input_ids` where `inputs_embeds` are there.

    Attributes:
        reports: a QuotaReport of every video.
        index: place of every position in the caller's prompt, [B, L'] int64, -1 where padded.
    """

    reports: tuple[Any, ...] = ()
    index: Tensor


class QuotaVideoModel(Wrapper):
    """A multimodal model whose frames get tokens by their relevance to the question, within one budget per video.

    Holds the model as `model`; every attribute that it does not have itself is the model's. Calls without a video go
    straight to the model. `forward` returns logits of the rebuilt prompt [B, L', V]; `generate` returns the ids that
    the caller passed, followed by the new tokens. Who wants to know what a call did asks for it:
    `with vtoken.tracing(quota) as record: ...`, then `record.video`. Settings are those of `vtoken.QuoTA`: attributes,
    and what `vtoken.config_of` and `vtoken.configure` speak of. Images of the same call stay whole, or are shortened
    by what `vtoken.apply` put into the model.

    Args:
        model: transformers LlavaOnevision, LlavaNextVideo, Qwen2VL, Qwen2_5_VL, Qwen3VL, Qwen3_5 or VideoLlama3
            ...ForConditionalGeneration, or one that a family of yours knows; plain or compiled.
        config, settings: a `vtoken.QuoTA`, or its values by name: budget, mode, min_tokens, max_tokens, power,
            count_separators, vision_chunk, rounding, shape.
        scorer, decoupler: used for calls that bring `frames` and a `query` but no scores; by default no scorer, and a
            decoupler that leaves the question as it is.
        adapter: "auto", or a `vtoken.prompts.family.Family`; fixed once the wrapper is built.

    Raises:
        UnsupportedModelError: if no family knows the model, or it has no videos.
        ConfigError: if a setting is wrong.

    Source: arXiv 2503.08689; exact budgets are docs/methods/quota.md 6.
    """

    _vtoken_records = True
    _fixed = frozenset({"adapter"})
    _settings: QuoTA
    _method: FrameBudget

    budget, mode, power = setting("budget"), setting("mode"), setting("power")
    min_tokens, max_tokens = setting("min_tokens"), setting("max_tokens")
    count_separators, vision_chunk = setting("count_separators"), setting("vision_chunk")
    rounding, shape = setting("rounding"), setting("shape")

    def __init__(
        self,
        model: nn.Module,
        config: QuoTA | None = None,
        *,
        scorer: Scorer | None = None,
        decoupler: Decoupler | None = None,
        adapter: HostAdapter | str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        config = settings_from("QuotaVideoModel", QuoTA, config, settings)
        self._family = _family(model, adapter)
        self.model = model
        self.scorer: Any = scorer
        self.decoupler = IdentityDecoupler() if decoupler is None else decoupler
        self._warned = False
        self._adopt(config)

    def _adopt(self, settings: QuoTA) -> None:
        """Make these the settings; raises ConfigError, nothing changed, where they do not fit the model."""
        method = FrameBudget(settings)
        self._family.check(self._core, {PromptMethod: method})
        super()._adopt(settings)
        self._method = method

    @property
    def adapter(self) -> Any:
        """The family of the model."""
        return self._family

    @adapter.setter
    def adapter(self, value: Any) -> None:
        self._change({"adapter": value})

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
        core = self._core
        given = by_name(core.forward, args, kwargs)
        if not self._has_video(given, frame_scores, frames, features):
            go_on(core, self._family, given)
            return self.model(*args, **kwargs)
        service, given, prepared, _ = self._rebuilt(given, frame_scores, query, frames, features, generating=False)
        return forwarded(service, self.model, prepared, given)

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
        core = self._core
        given = by_name(core.generate, args, kwargs)
        ids: Any = given.get("input_ids", given.get("inputs"))
        if not self._has_video(given | {"input_ids": ids}, frame_scores, frames, features):
            check_goes_on(core, self._family, given, ids)
            go_on(core, self._family, given)
            return core.generate(*args, **kwargs)
        from vtoken.prompts.generation import check_way  # only with a model of transformers

        check_way(core, given)
        given = with_ids(core, {name: value for name, value in given.items() if name != "inputs"}, ids)
        service, given, prepared, _ = self._rebuilt(given, frame_scores, query, frames, features, generating=True)
        return generated(service, core.generate, prepared, given)

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
        core, family, generating = self._core, self._family, padding_side == "left"
        _, _, prepared, told = self._rebuilt(inputs, frame_scores, query, frames, features, generating=generating)
        target, call = family.hand_over(core, dict(prepared.call), generating=generating)
        if target is not core:  # an older release encodes in its forward: there `forward` calls a stand-in
            call = {name: value for name, value in prepared.call.items() if name != "features"}
            call["mm_encoder_outputs"] = prepared.call["features"]
        if prepared.offset is not None:
            family.go_on(core, prepared.offset)
        made = PreparedPrompt(call | {"input_ids": prepared.ids})
        made.index, made.reports = prepared.index, told
        return made

    def encode_video(self, **inputs: Any) -> VideoFeatures:
        """Run the tower on one video, once for any number of questions about it.

        Args:
            inputs: what the processor returned; the prompt is not read.

        Raises:
            InputError: if there is not exactly one video.
        """
        core, family = self._core, self._family
        if inputs.get(_PIXELS) is None:
            raise InputError(f"encode_video needs {_PIXELS}")
        given = {name: value for name, value in inputs.items() if value is not None and name != "pixel_values"}
        needs = self._method.needs(family.facts(core, given))
        family.refuse(core, given, needs)
        visuals = family.layout(core, given)
        if len(visuals) != 1:
            raise InputError(
                f"encode_video takes one video, got {len(visuals)}; call it for each and pass a list of features"
            )
        encoded = family.encode(core, given, visuals, needs)
        kept = {name: torch.as_tensor(given[name]) for name in family.numbering if name in given}
        return VideoFeatures(visuals[0], encoded, kept)

    @property
    def _core(self) -> Any:
        """The model itself where it was compiled."""
        return getattr(self.model, "_orig_mod", self.model)

    def _rebuilt(
        self,
        inputs: dict[str, Any],
        frame_scores: Any,
        query: Any,
        frames: Any,
        features: Features | None,
        *,
        generating: bool,
    ) -> tuple[Service, dict[str, Any], Prepared, tuple[Any, ...]]:
        """Who shortens a call, the call, what became of it, and a report of every video."""
        core, family, asked = self._core, self._family, asked_of(self)
        given = {name: value for name, value in inputs.items() if value is not None}
        if given.get("input_ids") is None or "inputs_embeds" in given or "mm_encoder_outputs" in given:
            raise InputError(
                "a call with a video needs input_ids, and neither inputs_embeds nor mm_encoder_outputs: its prompt is "
                "rebuilt from ids. Tuned prompts (peft's PromptTuningConfig and the like) cannot be combined with it"
            )
        known = [features] if isinstance(features, VideoFeatures) else list(features or [])
        known = [video.to(given["input_ids"].device) for video in known]
        for name in dict.fromkeys(name for video in known for name in video.inputs):
            given.setdefault(name, torch.cat([video.inputs[name] for video in known]))
        scores = asked.get("frame_scores") if frame_scores is None else frame_scores

        def told(videos: list[Visual]) -> list[dict[str, Any]]:
            return [{"frame_scores": each} for each in self._scores(videos, scores, query, frames)]

        own = service_of(core) if "_vtoken_family" in core.__dict__ else Service(core, family, {}, {})
        service = replace(
            own,
            methods={**own.methods, "video": self._method},
            asked={**own.asked, "video": asked},
            told=told,
            known=[(video.visual, video.encoded) for video in known],
        )
        prepared, token_id = eagerly(service, given, generating=generating), family.token_ids(core)["video"]
        if prepared is None:
            videos = [*family.layout(core, given), *(visual for visual, _ in service.known)]
            raise ShapeError(
                "0 video placeholders in the prompt, but its video(s) need "
                f"{sum(v.length for v in videos if v.kind == 'video')}: let the model's processor write the prompt"
            )
        scoring = 0 if scores is not None or self.scorer is None else None
        made = reports(core, token_id, given, prepared, scoring)
        record = current_trace(self)
        if record is not None:
            record.record_video(VideoRecord(made, prepared.index, prepared.ids))
        return service, given, prepared, made

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
        if outputs is not None and not is_chosen(outputs):
            warnings.warn(
                "a QuotaVideoModel spends its budget on videos that it encodes: this call came with mm_encoder_outputs "
                "and runs without a budget; pass pixel_values_videos, or features of encode_video",
                VTokenWarning,
                stacklevel=3,
            )
        ready = any(given.get(name) is not None for name in ("inputs_embeds", "mm_encoder_outputs"))
        if isinstance(ids, Tensor) and not ready and not is_filled(cache_of(given)):
            count = int((ids == self._family.token_ids(self._core)["video"]).sum())
            if count:
                raise InputError(f"{count} video placeholders in the prompt, but no {_PIXELS} and no features")
        return False

    def _scores(
        self, videos: Sequence[Visual], frame_scores: Any, query: Any, frames: Any
    ) -> list[list[float]]:  # fmt: skip
        """Scores of the cells of every video."""
        if frame_scores is None:
            if self.scorer is None:
                self._warn_uniform()
                return [[1.0] * len(video.cells) for video in videos]
            frame_scores = self._scored(videos, query, frames)
        found = clues_for(self._method, {"frame_scores": frame_scores}, len(videos))
        return [
            per_cell(clues["frame_scores"], video, f"video {i}")
            for i, (clues, video) in enumerate(zip(found, videos, strict=True))
        ]

    def _warn_uniform(self) -> None:
        """Once for every wrapper."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "QuotaVideoModel has neither frame_scores nor a scorer: the budget is spread evenly over the frames",
                VTokenWarning,
                stacklevel=3,
            )

    def _scored(self, videos: Sequence[Visual], query: Any, frames: Any) -> list[Tensor]:
        count = len(videos)
        if frames is None or query is None:
            raise InputError("the scorer needs frames=... and query=...; or pass frame_scores=...")
        shown = list(frames) if _holds_videos(frames) else [frames]
        queries = [query] * count if isinstance(query, str) else list(query)
        if len(shown) != count or len(queries) != count:
            raise InputError(
                f"frames for {len(shown)} video(s) and {len(queries)} question(s), but there are {count} video(s)"
            )
        for i, (pictures, video) in enumerate(zip(shown, videos, strict=True)):  # before the scorer's work
            per_cell([0.0] * len(pictures), video, f"video {i}")
        pairs = zip(shown, queries, strict=True)
        return [score_frames(self.scorer, list(each), self.decoupler.decouple(asked)) for each, asked in pairs]


def _family(model: nn.Module, adapter: HostAdapter | str) -> Any:
    core = getattr(model, "_orig_mod", model)
    if adapter != "auto" and not isinstance(adapter, Family):
        raise ConfigError(f'adapter={adapter!r}: must be "auto" or a vtoken.prompts.family.Family')
    family: Any = adapter if isinstance(adapter, Family) else host_of(core, "prompt").adapter
    if "video" not in family.kinds:
        raise UnsupportedModelError(
            f"cannot spend a token budget on the videos of {type(core).__name__}: vtoken knows only its "
            f"{' and '.join(family.kinds)}s. vtoken.register_adapter adds a family of your own"
        )
    return family


def _holds_videos(frames: Any) -> bool:
    """Whether these are videos, not frames: lists of images, or arrays of more dimensions than an image has."""
    first = frames[0] if len(frames) else None
    return isinstance(first, (list, tuple)) or getattr(first, "ndim", 0) > 3
