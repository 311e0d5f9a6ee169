"""Which frames of a video are looked at, and how a prompt says so (docs/methods/quota.md 3)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, InputError

if TYPE_CHECKING:
    from vtoken.video.read import VideoInfo


def num_frames(
    duration_s: float,
    base: int = 96,
    extra: int = 64,
    per_s: float = 3600.0,
    cap: bool = True,
    *,
    max_fps: float | None = None,
) -> int:
    """Frames to sample from a video: `base`, and more the longer it is.

    Args:
        duration_s: seconds.
        base: frames of a short video (T_base in the paper).
        extra: frames more for a video of `per_s` seconds (alpha in the paper).
        per_s: seconds.
        cap: never more than `extra` on top; the published code goes on adding beyond `per_s`.
        max_fps: never more than this many frames per second of video, rounded up; None means no such limit.

    Raises:
        InputError: if the duration is negative or not finite. ConfigError: if another number is out of range.

    Source: arXiv 2503.08689 section 3.1.

    Example:
        >>> from vtoken.video import num_frames
        >>> num_frames(60), num_frames(1800), num_frames(7200), num_frames(7200, cap=False)
        (97, 128, 160, 224)
    """
    if not (math.isfinite(duration_s) and duration_s >= 0):
        raise InputError(f"duration_s={duration_s!r}: a duration is a finite number of seconds from 0 on")
    if base < 1 or extra < 0 or not per_s > 0 or (max_fps is not None and not max_fps > 0):
        raise ConfigError(
            f"base={base} must be at least 1, extra={extra} at least 0, per_s={per_s} and max_fps={max_fps} above 0"
        )
    more = math.floor(duration_s / per_s * extra)
    count = base + (min(more, extra) if cap else more)
    return count if max_fps is None else max(1, min(count, math.ceil(duration_s * max_fps)))


def sample_frame_indices(total_frames: int, n: int) -> list[int]:
    """`n` evenly spaced frame numbers of a video, the first and the last one among them; all of them if it is shorter.

    Raises:
        InputError: if total_frames is no whole number from 1 on. ConfigError: if n is none.

    Example:
        >>> from vtoken.video import sample_frame_indices
        >>> sample_frame_indices(100, 4), sample_frame_indices(3, 8)
        ([0, 33, 66, 99], [0, 1, 2])
    """
    try:
        total_frames = operator.index(total_frames)
    except TypeError:
        raise InputError(f"total_frames={total_frames!r}: frames come in whole numbers") from None
    try:
        n = operator.index(n)
    except TypeError:
        raise ConfigError(f"n={n!r}: frames come in whole numbers") from None
    if total_frames < 1:
        raise InputError(f"total_frames={total_frames}: there is no frame to sample")
    if n < 1:
        raise ConfigError(f"n={n}: at least one frame must be sampled")
    n = min(n, total_frames)
    return [i * (total_frames - 1) // max(n - 1, 1) for i in range(n)]


def frame_times(indices: Sequence[int], fps: float) -> list[float]:
    """The time of every frame in seconds.

    Raises:
        InputError: if `fps` is not a number above 0.

    Example:
        >>> import vtoken
        >>> vtoken.video.frame_times([0, 15, 30], fps=30)
        [0.0, 0.5, 1.0]
    """
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"fps={fps!r}: frame times need a number of frames per second above 0")
    return [index / fps for index in indices]


def processor_arguments(info: VideoInfo, indices: Sequence[int]) -> dict[str, Any]:
    """What a transformers processor must be told about frames that were sampled before it sees them.

    Without it the processor samples once more, and takes the frames for a video of its own default rate: Qwen2.5-VL's
    seconds per cell and Qwen3-VL's time stamps are wrong then. For a call with several videos, put the entries of
    "video_metadata" into one list, a video each.

    Args:
        info: of the video, as `video_info` gives it.
        indices: of the frames, as `read_frames` was given them, in order of time.

    Returns:
        Keyword arguments of the processor's call: "do_sample_frames", "video_metadata".

    Raises:
        InputError: if there is no index, or one that the video does not have, or they are out of order.

    Example:
        >>> from vtoken.video import VideoInfo, processor_arguments
        >>> processor_arguments(VideoInfo(100, 25.0, 64, 48), [0, 33, 66, 99])["video_metadata"][0]["frames_indices"]
        [0, 33, 66, 99]
    """
    try:
        indices = [operator.index(index) for index in indices]
    except TypeError:
        raise InputError("frame numbers are whole numbers") from None
    if not indices or indices[0] < 0 or indices[-1] >= info.frames or sorted(indices) != indices:
        raise InputError(f"indices must be frames 0 to {info.frames - 1} of the video in order of time, got {indices}")
    told = {
        "total_num_frames": info.frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "duration": info.duration,
        "frames_indices": indices,
    }
    return {"do_sample_frames": False, "video_metadata": [told]}


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """What a prompt for LLaVA-Video says before the question: duration, frame count and frame times.

    Args:
        duration: seconds.
        times: of all sampled frames, also of those that get no token.

    Example:
        >>> from vtoken.video import time_instruction
        >>> time_instruction(12.5, [0.0, 6.25, 12.5])
        'This video lasts 12.50 seconds; 3 frames were sampled evenly from it, at 0.00s,6.25s,12.50s. '
    """
    count = f"{len(times)} frame was" if len(times) == 1 else f"{len(times)} frames were"
    listed = ",".join(f"{time:.2f}s" for time in times)
    return f"This video lasts {duration:.2f} seconds; {count} sampled evenly from it, at {listed}. "
