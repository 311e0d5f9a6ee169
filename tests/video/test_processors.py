"""The way from a file to inputs (docs/tasks/long_video.md) on Qwen processors: all frames, at the file's own pace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.video.clips import coded, write_clip
from vtoken.errors import InputError
from vtoken.video import VideoInfo, processor_arguments

transformers = pytest.importorskip("transformers")
pytest.importorskip("av")

PAGE = Path(__file__).resolve().parents[2] / "docs/tasks/long_video.md"
MARKS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def processor(name: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", *MARKS, *"<>.0123456789", "seconds"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=MARKS
    )
    tokenizer.image_token, tokenizer.video_token = MARKS[:2]
    videos = (
        transformers.Qwen2VLVideoProcessor(patch_size=4, min_pixels=64, max_pixels=1024)
        if name == "Qwen2_5_VL"
        else transformers.Qwen3VLVideoProcessor(patch_size=4)
    )
    images = transformers.Qwen2VLImageProcessor(patch_size=4)
    return getattr(transformers, name + "Processor")(
        image_processor=images, video_processor=videos, tokenizer=tokenizer
    )


@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Qwen3VL"])
def test_the_pages_recipe_keeps_all_frames_at_their_times(name: str, tmp_path: Path) -> None:
    """48 seconds at 5 frames a second, 96 frames of it: cells of two frames, a second each."""
    clip = write_clip(tmp_path / "clip.mp4", 240, fps=5, pictures=[coded(k)[:, :64] for k in range(240)])
    [snippet] = [
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S) if "LVLMScorer" in text
    ]
    recipe = snippet[: snippet.index("quota = ")]
    names: dict[str, Any] = {"path": clip, "processor": processor(name)}
    names["prompt"] = "<|vision_start|><|video_pad|><|vision_end|>"
    exec(compile(recipe, str(PAGE), "exec"), names)
    inputs = names["inputs"]
    assert int(inputs["video_grid_thw"][0, 0]) == 48
    if name == "Qwen2_5_VL":
        assert [float(seconds) for seconds in inputs["second_per_grid_ts"]] == pytest.approx([1.0])


def test_arguments_are_checked() -> None:
    info = VideoInfo(10, 5.0, 64, 48)
    told = processor_arguments(info, [0, 4, 9])
    assert told["do_sample_frames"] is False
    [video] = told["video_metadata"]
    assert (video["fps"], video["total_num_frames"], video["frames_indices"]) == (5.0, 10, [0, 4, 9])
    for wrong in ([], [10], [-1, 2], [4, 3], [0.5]):
        with pytest.raises(InputError):
            processor_arguments(info, wrong)  # type: ignore[arg-type]
