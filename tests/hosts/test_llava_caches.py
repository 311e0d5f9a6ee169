"""Key-value caches of shortened prompts: told apart under either name, refused, and gone on from.

Source: docs/methods/vtc_cls.md 7.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken
from tests.helpers import assert_close

transformers = pytest.importorskip("transformers")

from tests.hosts.llavas import build, by_hand, features_of, images, plain_scores, plain_top, prompt  # noqa: E402

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
#: The argument is called "cache" from 5.24 on, where the old name still works.
NEW = "cache" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
NAMES = ["cache", "past_key_values"] if NEW else ["past_key_values"]
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


def pruned(budget: int = 6) -> tuple[Any, dict[str, Tensor], Tensor]:
    model = vtoken.apply(build("llava"), vtoken.VTCCLS(num_tokens=budget))
    return model, prompt([1, 5, -36, 7], [2, -36, 6, 8]), images(2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("made_by", ["generate", "own cache", "forward", "tuple"])
def test_full_ids_are_refused_whatever_made_the_cache(name: str, made_by: str) -> None:
    model, given, pixels = pruned()
    call = given | {"pixel_values": pixels}
    with torch.no_grad():
        if made_by == "generate":
            cache = model.generate(**call, **GREEDY, return_dict_in_generate=True)[NAMES[0]]
        elif made_by == "own cache":  # generate returns a tensor, so the cache is known from the call alone
            cache = transformers.DynamicCache(config=model.config.text_config)
            model.generate(**call, **GREEDY, **{name: cache})
        elif made_by == "forward":
            cache = model(**call, use_cache=True)[NAMES[0]]
        else:
            parts = model(**call, use_cache=True, return_dict=False)
            cache = next(part for part in parts if hasattr(part, "get_seq_length"))
    longer = torch.cat([given["input_ids"], torch.tensor([[5, 6], [7, 8]])], 1)
    length = cache.get_seq_length()
    with pytest.raises(vtoken.InputError, match="shortened prompt"):
        model.generate(input_ids=longer, **GREEDY, **{name: cache})
    with pytest.raises(vtoken.InputError, match="cache that is not empty"):
        model.generate(input_ids=longer, pixel_values=pixels, **GREEDY, **{name: cache})
    with pytest.raises(vtoken.InputError, match="cache that is not empty"):
        model(**call, **{name: cache})
    assert cache.get_seq_length() == length, "a refused call leaves the cache as it was"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_second_image_in_a_cached_turn(name: str) -> None:
    """Its ids must be short already; the mask covers both turns."""
    model, _, pixels = pruned()
    four = torch.cat([pixels, images(2, seed=5)])
    first = prompt([1, 5, -6, 7], [2, -6, 6, 8])["input_ids"]
    second = prompt([3, 4, -6, 7], [5, -6, 6, 8])
    mask = torch.ones(2, 9 + 9, dtype=torch.long)
    mask[0, 1] = 0
    cache = transformers.DynamicCache(config=model.config.text_config)
    model(input_ids=first, pixel_values=pixels, attention_mask=mask[:, :9], **{name: cache})
    out, trace = vtoken.trace(model, **second, pixel_values=four[2:], attention_mask=mask, **{name: cache})
    assert trace.prompt.index.tolist() == [[*range(9)]] * 2
    with pytest.raises(vtoken.InputError, match="cache that is not empty"):
        model(**prompt([3, -36], [5, -36]), pixel_values=pixels, **{name: cache})
    longer = torch.cat([first, second["input_ids"], torch.tensor([[5], [6]])], 1)
    assert model.generate(input_ids=longer, **GREEDY, **{name: cache}).shape == (2, 23), "both turns are short"
    vtoken.remove(model)
    kept = [plain_top(row, 6) for row in plain_scores(model, four, 2, 2)]
    turns = []
    for rows, chosen in ((([1, 5, -36, 7], [2, -36, 6, 8]), (0, 1)), (([3, 4, -36, 7], [5, -36, 6, 8]), (2, 3))):
        features = features_of(model, pixel_values=four[list(chosen)])
        turns.append(by_hand(model, prompt(*rows), features, [kept[i] for i in chosen])["inputs_embeds"])
    reference = model(inputs_embeds=torch.cat(turns, 1), attention_mask=mask).logits[:, 9:]
    assert_close("second turn", reference, out.logits, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_all_goes_on_from_a_cache_bit_for_bit(name: str) -> None:
    model, second = build("llava"), prompt([3, 4, -36, 7], [5, -36, 6, 8]) | {"pixel_values": images(2, seed=5)}
    mask = torch.ones(2, 3 + 39, dtype=torch.long)

    def turns() -> Tensor:
        cache = transformers.DynamicCache(config=model.config.text_config)
        model(input_ids=torch.tensor([[1, 5, 6], [2, 7, 8]]), **{name: cache})
        logits: Tensor = model(**second, attention_mask=mask, **{name: cache}).logits
        return logits

    stock = turns()
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=36))
    assert torch.equal(turns(), stock)


@torch.no_grad()
def test_a_cache_that_was_emptied_is_a_new_one() -> None:
    """What an earlier, shorter prompt left on it counts no more."""
    model, given, pixels = pruned()
    cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=64)
    more = torch.tensor([[5], [6]])
    model.generate(**given, pixel_values=pixels, **GREEDY, **{NAMES[0]: cache})
    vtoken.configure(model, num_tokens=36)
    cache.reset()
    ids = model.generate(**given, pixel_values=pixels, **GREEDY, **{NAMES[0]: cache})
    longer = torch.cat([ids, more], 1)
    assert model.generate(input_ids=longer, **GREEDY, **{NAMES[0]: cache}).shape[1] == longer.shape[1] + 4
    vtoken.configure(model, num_tokens=6)
    cache.reset()
    again = model.generate(**given, pixel_values=pixels, **GREEDY, **{NAMES[0]: cache})
    with pytest.raises(vtoken.InputError, match="shortened prompt"):
        model.generate(input_ids=torch.cat([again, more], 1), **GREEDY, **{NAMES[0]: cache})
