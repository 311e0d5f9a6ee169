"""What QuoTA should give a language model, built one token at a time from the model's own submodules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.quota.builders import GRID, IMAGE, NATIVE, PAD, QWEN, VIDEO


def grids(kind: str, model: Any, inputs: dict[str, Tensor]) -> list[list[list[Tensor]]]:
    """Of every video and cell the features [H, W, C] that are resampled, and those of deeper levels; cell by cell."""
    inner, (height, width) = model.model, NATIVE[kind]
    pixels, found = inputs["pixel_values_videos"], []
    if kind in ("onevision", "next"):
        for video in pixels:
            cells = []
            for frame in video:
                tower = inner.vision_tower(frame[None], output_hidden_states=True)
                rows = tower.hidden_states[model.config.vision_feature_layer][0]
                rows = inner.multi_modal_projector(rows) if kind == "onevision" else rows[1:]
                cells.append([rows.view(height, width, -1)])
            found.append(cells)
        return found
    start = 0
    for t, h, w in inputs["video_grid_thw"].tolist():
        cells = []
        for _ in range(t):
            thw, part = torch.tensor([[1, h, w]]), pixels[start : start + h * w]
            start += h * w
            if kind == "llama3":
                rows = inner.vision_model(part, thw, torch.tensor([2])).last_hidden_state
                levels = [inner.projector(rows)]
            else:
                out = inner.visual(part, grid_thw=thw)
                levels = [out.pooler_output, *getattr(out, "deepstack_features", [])]
            cells.append([level.view(height, width, -1) for level in levels])
        found.append(cells)
    return found


def widths(t: int, height: int, width: int) -> list[int]:
    """The row plan of docs/methods/quota.md 7.1."""
    if t == 0:
        return []
    h = max(1, min(math.floor(math.sqrt(t * height / width) + 0.5), height, t), math.ceil(t / width))
    base, extra = divmod(t, h)
    return [base + (r + 1) * extra // h - r * extra // h for r in range(h)]


def frame_tokens(grid: Tensor, t: int, mode: str) -> list[tuple[Tensor, int, int]]:
    """Tokens of one grid [H, W, C], each with the row and column that it stands for.

    Source: docs/methods/quota.md 7.2, 7.3, 9.4.
    """
    height, width, _ = grid.shape
    plan, out = widths(t, height, width), []
    for r, w in enumerate(plan):
        image = grid.permute(2, 0, 1)[None]
        size = (len(plan), w)
        small = (
            F.interpolate(image, size, mode="bilinear") if mode == "bilinear" else F.adaptive_avg_pool2d(image, size)
        )
        for c in range(w):
            row = math.floor((2 * r + 1) * height / (2 * len(plan)))
            out.append((small[0, :, r, c], row, math.floor((2 * c + 1) * width / (2 * w))))
    return out


def positions_of(kind: str, model: Any, given: dict[str, Tensor]) -> Tensor:
    """Positions [3, B, L] of the full prompt, by the model's own code."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    named = {name: given[name] for name in names if name in given}
    if kind == "qwen2_5":
        named["second_per_grid_ts"] = given["second_per_grid_ts"]
    return model.model.get_rope_index(**named)[0]


def by_hand(
    kind: str,
    model: Any,
    given: dict[str, Tensor],
    counts: list[list[int]],
    *,
    mode: str = "bilinear",
    newline: str | None = None,
    side: str = "right",
    labels: Tensor | None = None,
    images: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Embeddings, mask, positions and labels of the rebuilt prompt; deeper levels as one list of rows per level.

    Args:
        counts: of every video, tokens of every cell.
        images: rows of image tokens, in prompt order.
    """
    inner, table = model.model, model.get_input_embeddings()
    newline = newline or ("video" if kind == "onevision" else "none")
    all_grids = grids(kind, model, given)
    places = positions_of(kind, model, given) if kind in QWEN else None
    ids, mask = given["input_ids"], given.get("attention_mask")
    rows: list[list[dict[str, Any]]] = []
    video = cell = 0
    image_rows = [] if images is None else [row for image in images for row in image]
    for b in range(ids.shape[0]):
        row: list[dict[str, Any]] = []
        j = 0
        while j < ids.shape[1]:
            at = None if places is None else places[:, b, j]
            label = -100 if labels is None else int(labels[b, j])
            if mask is not None and mask[b, j] == 0:
                j += 1
            elif ids[b, j] == VIDEO:
                levels = all_grids[video][cell]
                found = [frame_tokens(level, counts[video][cell], mode) for level in levels]
                last = None
                for i, (token, r, c) in enumerate(found[0]):
                    if newline == "row" and last is not None and r != last:
                        row.append({"embed": inner.image_newline, "label": -100})
                    last = r
                    token = inner.multi_modal_projector(token[None])[0] if kind == "next" else token
                    step = None if at is None else torch.stack([at[0], at[1] + r, at[2] + c])
                    row.append({"embed": token, "at": step, "label": -100, "deep": [f[i][0] for f in found[1:]]})
                if newline == "row" and last is not None:
                    row.append({"embed": inner.image_newline, "label": -100})
                j += GRID[kind]
                cell += 1
                if cell == len(all_grids[video]):
                    video, cell = video + 1, 0
                    if newline == "video":
                        row.append({"embed": inner.image_newline, "label": -100})
                        j += 1
            elif ids[b, j] == IMAGE:
                row.append({"embed": image_rows.pop(0), "at": at, "label": label})
                j += 1
            else:
                row.append({"embed": table(ids[b, j]), "at": at, "label": label})
                j += 1
        rows.append(row)
    assert video == len(all_grids)
    assert not image_rows
    return _padded(rows, table(torch.tensor(PAD)), side, labels is not None, places is not None)


def _padded(rows: list[list[dict[str, Any]]], blank: Tensor, side: str, labelled: bool, placed: bool) -> dict[str, Any]:
    width = max(map(len, rows))
    embeds, mask, new_labels, axes, visual = [], [], [], [], []
    deep: list[list[Tensor]] = []
    for row in rows:
        fill: list[dict[str, Any]] = [{"embed": blank, "label": -100, "at": torch.zeros(3, dtype=torch.long), "pad": 1}]
        fill = fill * (width - len(row))
        full = fill + row if side == "left" else row + fill
        embeds.append(torch.stack([x["embed"] for x in full]))
        mask.append([0 if "pad" in x else 1 for x in full])
        new_labels.append([x["label"] for x in full])
        visual.append(["deep" in x and len(x["deep"]) > 0 for x in full])
        deep += [x["deep"] for x in full if x.get("deep")]
        if placed:
            axes.append(torch.stack([x["at"] for x in full], dim=1))
    out: dict[str, Any] = {"inputs_embeds": torch.stack(embeds), "attention_mask": torch.tensor(mask)}
    if placed:
        out["position_ids"] = torch.stack(axes, dim=1)
    if labelled:
        out["labels"] = torch.tensor(new_labels)
    if deep:
        out["visual_pos_masks"] = torch.tensor(visual)
        out["deepstack_visual_embeds"] = [torch.stack(list(level)) for level in zip(*deep, strict=True)]
    return out


def logits_of(model: Any, fed: dict[str, Any]) -> Tensor:
    """Logits of hand-fed embeddings, through the language model itself where there are deeper levels."""
    if "visual_pos_masks" not in fed:
        return model(**{name: value for name, value in fed.items() if name != "labels"}).logits
    named = {name: value for name, value in fed.items() if name != "labels"}
    return model.lm_head(model.model.language_model(**named).last_hidden_state)
