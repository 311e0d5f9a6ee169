"""Token budgets for video by relevance to a question (QuoTA): sampling, clues, scores, reports.

The allocation and the resampling of frames are `vtoken.ops.allocate_tokens` and `vtoken.ops.assign`. Importing this
loads neither PyAV, transformers nor open_clip.
"""

from vtoken.video.clip import CLIPScorer
from vtoken.video.decouple import Clue, CoTDecoupler, Decoupler, IdentityDecoupler, RuleDecoupler
from vtoken.video.lvlm import LVLMScorer, frame_question, text_generator
from vtoken.video.pictures import to_image
from vtoken.video.read import VideoInfo, read_frames, video_info
from vtoken.video.report import QuotaReport
from vtoken.video.sampling import (
    frame_times,
    num_frames,
    processor_arguments,
    sample_frame_indices,
    time_instruction,
)
from vtoken.video.scorers import PrecomputedScorer, Scorer, UniformScorer, score_frames, scoring_flops

__all__ = [
    "CLIPScorer",
    "Clue",
    "CoTDecoupler",
    "Decoupler",
    "IdentityDecoupler",
    "LVLMScorer",
    "PrecomputedScorer",
    "QuotaReport",
    "RuleDecoupler",
    "Scorer",
    "UniformScorer",
    "VideoInfo",
    "frame_question",
    "frame_times",
    "num_frames",
    "processor_arguments",
    "read_frames",
    "sample_frame_indices",
    "score_frames",
    "scoring_flops",
    "text_generator",
    "time_instruction",
    "to_image",
    "video_info",
]
