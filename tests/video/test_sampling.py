"""How many frames, which ones, and the counts of a report."""

from __future__ import annotations

import itertools
import json
import math
import random
from fractions import Fraction

import pytest
import transformers

from vtoken.accounting.prefill import Decoder, prefill_flops
from vtoken.accounting.vision import Tower, tower_flops
from vtoken.errors import ConfigError, InputError
from vtoken.video import QuotaReport, frame_times, num_frames, sample_frame_indices, time_instruction

QWEN2_7B = Decoder(layers=28, width=3584, mlp_width=18944, kv_width=4 * 128, q_width=28 * 128)
SO400M = Tower(layers=27, width=1152, mlp_width=4304)


def test_longer_videos_get_more_frames_up_to_a_cap() -> None:
    assert [num_frames(s) for s in (0, 56, 57, 900, 3600, 7200)] == [96, 96, 97, 112, 160, 160]
    assert num_frames(7200, cap=False) == 224
    assert num_frames(1800, base=32, extra=32) == 48
    assert num_frames(600, per_s=600, extra=10) == 106
    assert num_frames(10, max_fps=2) == 20
    assert num_frames(10.2, max_fps=1) == 11
    assert num_frames(0, max_fps=1) == 1
    assert num_frames(1e5, max_fps=2) == 160
    for wrong in ({"base": 0}, {"extra": -1}, {"per_s": 0}, {"max_fps": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            num_frames(10, **wrong)
    with pytest.raises(InputError, match="duration_s=nan"):
        num_frames(math.nan)


def test_indices_are_even_and_hold_both_ends() -> None:
    assert sample_frame_indices(86313, 159)[79] == 43156  # a float linspace gives 43155
    rng = random.Random(0)
    for _ in range(2000):
        total, n = rng.randint(1, 100_000), rng.randint(1, 300)
        indices = sample_frame_indices(total, n)
        assert len(indices) == min(n, total)
        assert indices[0] == 0
        if len(indices) > 1:
            assert indices[-1] == total - 1
            assert all(b > a for a, b in itertools.pairwise(indices))
            for i, index in enumerate(indices):
                assert 0 <= Fraction(i * (total - 1), len(indices) - 1) - index < 1
    with pytest.raises(InputError, match="total_frames=0"):
        sample_frame_indices(0, 4)
    with pytest.raises(ConfigError, match="n=0"):
        sample_frame_indices(4, 0)
    with pytest.raises(InputError, match=r"total_frames=4.5"):
        sample_frame_indices(4.5, 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"n=2.5"):
        sample_frame_indices(4, 2.5)  # type: ignore[arg-type]


def test_times_and_what_the_prompt_says() -> None:
    assert frame_times([0, 15, 31], 30) == [0, 0.5, 31 / 30]
    with pytest.raises(InputError, match="fps=0"):
        frame_times([1], 0)
    text = time_instruction(63.456, [0, 31.5, 63.0])
    assert "63.46 seconds" in text
    assert "3 frames" in text
    assert "0.00s,31.50s,63.00s" in text
    assert "1 frame was" in time_instruction(1, [0])


@pytest.mark.parametrize(("n", "tflops"), [(12544, 195.29), (13440, 211.65), (6272, 89.75), (3136, 42.90)])
def test_prefill_of_qwen2_7b(n: int, tflops: float) -> None:
    assert round(prefill_flops(QWEN2_7B, n, causal=True) / 1e12, 2) == tflops


def test_prefill_splits_as_published() -> None:
    whole, causal = prefill_flops(QWEN2_7B, 12544), prefill_flops(QWEN2_7B, 12544, causal=True)
    attention = 2 * (whole - causal)  # halved for causality
    assert round(attention / 2 / 1e12, 2) == 31.58
    assert round((whole - attention) / 1e12, 2) == 163.71


def test_prefill_reads_grouped_queries_and_head_size_of_a_config() -> None:
    config = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
    )  # fmt: skip
    by_hand = 0
    for _ in range(3):
        by_hand += 2 * 7 * (64 * (4 + 2 * 2) * 32 + 4 * 32 * 64 + 3 * 64 * 96) + 4 * 7 * 7 * 4 * 32 // 2
    assert prefill_flops(config, 7, causal=True) == by_hand


def test_towers() -> None:
    assert round(tower_flops(SO400M, 729) / 1e9, 1) == 665.5
    assert round(tower_flops(Tower(24, 1024, 4096), 257) / 1e9, 1) == 161.7
    siglip = transformers.SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)
    assert Tower.of(siglip) == SO400M
    qwen = transformers.Qwen2VLConfig().vision_config
    assert Tower.of(qwen) == Tower(32, 1280, 5120)
    with pytest.raises(ConfigError, match="cannot read a vision tower's measures from object"):
        Tower.of(object())


def test_report() -> None:
    report = QuotaReport(
        scores=(0.9, 0.0, 0.3), tokens_per_frame=(300, 0, 92), rows_per_frame=(17, 0, 10), budget_requested=392,
        default_tokens=196, separator_tokens=1, sequence_length_before=639, sequence_length_after=443,
        decoder=QWEN2_7B, tower=SO400M, patches_per_frame=729, scorer_flops=3 * 10**12,
    )  # fmt: skip
    assert (report.frames, report.frames_kept, report.content_tokens, report.baseline_content_tokens) == (
        3,
        2,
        392,
        588,
    )
    assert report.prefill_flops_after == prefill_flops(QWEN2_7B, 443, causal=True)
    assert report.tower_flops == 3 * tower_flops(SO400M, 729)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["tokens_per_frame"] == [300, 0, 92]
    assert values["budget_effective"] == 392
    assert values["decoder"]["q_width"] == 3584
    text = str(report)
    for said in ("3 frames, 2 kept: 392 tokens (588 without a budget), 1 separators", "639 -> 443", "scorer 3 TFLOPs"):
        assert said in text
    short = QuotaReport((0.5,), (196,), (14,), 500, 196, 0, 200, 200)
    assert short.prefill_flops_before is short.tower_flops is None
    assert "196 tokens of a budget of 500" in str(short)
