"""`shrink_inputs` alone: any prompt against a plain loop over its rows (docs/methods/vtc_cls.md 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtoken

IMAGE, PAD = 9, 7


def loop(ids: Tensor, kept: list[list[int]], lengths: list[int], mask: Tensor | None, side: str) -> list[list[int]]:
    """Old positions of every new row, -1 for padding; the padding side of rows that have some."""
    image = place = 0
    rows, sides = [], []
    for b, row in enumerate(ids.tolist()):
        stay = []
        seen = [1] * len(row) if mask is None else mask[b].tolist()
        real = [i for i, m in enumerate(seen) if m]
        for i, token in enumerate(row):
            inside = bool(real) and real[0] <= i <= real[-1]
            if token == IMAGE:
                if place in kept[image] and inside:
                    stay.append(i)
                place += 1
                if place == lengths[image]:
                    image, place = image + 1, 0
            elif inside:
                stay.append(i)
        rows.append(stay)
        sides.append("left" if seen[0] == 0 else "right" if seen[-1] == 0 else None)
    width = max(map(len, rows))
    default = "left" if "left" in sides else "right" if "right" in sides else side
    out = []
    for stay, own in zip(rows, sides, strict=True):
        fill = [-1] * (width - len(stay))
        out.append(fill + stay if (own or default) == "left" else stay + fill)
    return out


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    rows, lengths = [], []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
        for _ in range(draw(st.integers(0, 2))):
            length = draw(st.integers(1, 5))
            lengths.append(length)
            row = row + [IMAGE] * length + draw(st.lists(st.integers(0, 6), max_size=2))
        rows.append(row)
    side = draw(st.sampled_from(["left", "right"]))
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    ids = [[PAD] * (width - len(r)) + r if side == "left" else r + [PAD] * (width - len(r)) for r in rows]
    mask = [
        [0] * (width - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (width - len(r)) for r in rows
    ]
    kept = [sorted(draw(st.sets(st.integers(0, n - 1), min_size=1))) for n in lengths]
    return {"ids": torch.tensor(ids), "mask": torch.tensor(mask), "kept": kept, "lengths": lengths}


@settings(deadline=None, max_examples=150)
@given(case=cases(), masked=st.booleans(), side=st.sampled_from(["left", "right"]))
def test_any_prompt(case: dict[str, Any], masked: bool, side: str) -> None:
    ids, mask = case["ids"], case["mask"] if masked else None
    labels = torch.arange(ids.numel()).view_as(ids)
    short = vtoken.shrink_inputs(
        ids, [torch.tensor(k) for k in case["kept"]], case["lengths"], token_id=IMAGE, attention_mask=mask,
        labels=labels, token_type_ids=labels + 1, mm_token_type_ids=labels + 2, pad_token_id=PAD, padding_side=side,
    )  # fmt: skip
    if sum(map(len, case["kept"])) == sum(case["lengths"]):
        assert short.input_ids is ids, "nothing to drop: nothing changes"
        assert short.attention_mask is mask
        assert short.labels is labels
        return
    index = torch.tensor(loop(ids, case["kept"], case["lengths"], mask, side))
    assert torch.equal(short.index, index)
    pad = index < 0
    expected = {"input_ids": (ids, PAD), "labels": (labels, -100), "token_type_ids": (labels + 1, 0),
                "mm_token_type_ids": (labels + 2, 0)}  # fmt: skip
    for name, (full, fill) in expected.items():
        assert torch.equal(getattr(short, name), full.gather(1, index.clamp_min(0)).masked_fill(pad, fill)), name
    if mask is not None:
        assert torch.equal(short.attention_mask, mask.gather(1, index.clamp_min(0)).masked_fill(pad, 0))
    elif bool(pad.any()):
        assert torch.equal(short.attention_mask, (~pad).long())
    else:
        assert short.attention_mask is None
    assert short.position_ids is None


def shrink(ids: list[list[int]], kept: list[list[int]], lengths: list[int], **options: Any) -> Any:
    return vtoken.shrink_inputs(torch.tensor(ids), [torch.tensor(k) for k in kept], lengths, token_id=IMAGE, **options)


def test_original_positions_always_have_a_mask() -> None:
    short = shrink([[1, 9, 9, 9, 2]], [[1]], [3], positions="original")
    assert short.position_ids.tolist() == [[0, 2, 4]]
    assert short.attention_mask.tolist() == [[1, 1, 1]]
    padded = shrink([[7, 7, 1, 9, 9, 2], [1, 9, 9, 2, 3, 4]], [[1], [0]], [2, 2], positions="original",
                    attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))  # fmt: skip
    assert padded.position_ids.tolist() == [[0, 0, 0, 2, 3], [0, 1, 3, 4, 5]]
    own = shrink([[1, 9, 9, 2]], [[1]], [2], positions="original", position_ids=torch.tensor([[4, 5, 8, 9]]))
    assert own.position_ids.tolist() == [[4, 8, 9]]


def test_compact_positions() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    ids = [[7, 1, 9, 9, 2]]
    assert shrink(ids, [[1]], [2], attention_mask=mask, position_ids=torch.arange(5)[None]).position_ids is None
    by_mask = shrink(ids, [[1]], [2], attention_mask=mask, position_ids=torch.tensor([[0, 0, 1, 2, 3]]))
    assert by_mask.position_ids.tolist() == [[0, 1, 2]]
    with pytest.raises(vtoken.InputError, match="original"):
        shrink(ids, [[1]], [2], attention_mask=mask, position_ids=torch.tensor([[0, 0, 1, 2, 4]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [2]}, "3 placeholders"), ({"kept": [[0], [1]]}, "2 selection"), ({"kept": [[3]]}, "reaches 3"),
        ({"kept": [[-1, 1]]}, "reaches -1"), ({"kept": [[True, False, True]]}, "nonzero"),
        ({"kept": [[0.5]]}, "float32"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "more dimensions"), ({"labels": torch.ones(1, 4)}, "labels"),
        ({"position_ids": torch.zeros(3, 1, 5)}, "position_ids"), ({"ids": [1, 9, 9, 9, 2]}, "input_ids"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"ids": [[1, 9, 9, 9, 2]], "kept": [[0]], "lengths": [3]} | change
    with pytest.raises(ValueError, match=message):
        shrink(**given)
