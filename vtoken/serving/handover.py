"""Rows of images that were shortened outside an engine, in the form in which it takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vtoken.errors import InputError
from vtoken.prompts.serving import FinalRows


def image_embeds(found: Sequence[FinalRows], inputs: Mapping[str, Any]) -> Any:
    """What `vtoken.encode_images` found, as the entry "image" of vLLM's `multi_modal_data`.

    Args:
        found: the images of one prompt.
        inputs: what the processor returned for it.

    Returns:
        A list of rows [k, C], one for each image. Of models that number along three axes (Qwen-VL) a dict: rows of all
        images, `image_grid_thw`, `image_rows` (how many rows every image has) and `image_kept` (which tokens they are);
        deeper levels of features stand beside the rows.

    Raises:
        InputError: if there is a video among them, or the grids are missing.

    Example:
        >>> import torch, vtoken
        >>> from vtoken.prompts.serving import FinalRows
        >>> one = FinalRows("image", torch.zeros(3, 8), (), torch.tensor([0, 2, 5]), None)
        >>> [rows.shape for rows in vtoken.serving.image_embeds([one], {})]
        [torch.Size([3, 8])]
    """
    if any(final.kind != "image" for final in found):
        raise InputError("engines take ready rows of images; this call has a video")
    if all(final.places is None for final in found):
        return [final.rows for final in found]
    grids = inputs.get("image_grid_thw")
    if grids is None or len(grids) != len(found):
        raise InputError(f"image_grid_thw of {len(found)} image(s) is needed: pass all that the processor returned")
    return {
        "image_embeds": torch.cat([torch.cat([final.rows, *final.deeper], dim=-1) for final in found]),
        "image_grid_thw": torch.as_tensor(grids),
        "image_rows": torch.tensor([len(final.kept) for final in found]),
        "image_kept": torch.cat([final.kept for final in found]),
    }
