"""Train the small LLaVA that the repository ships: it answers questions about garments on photographs.

    python examples/train_llava.py                     # 8000 steps, about 35 minutes of one core; out/train_llava/model
    python examples/train_llava.py --small             # seconds, learns nothing

The tower's class token learns to name the garment, as a CLIP learns it from captions, its patches learn what they
show, and the whole model learns to answer. Whole pictures are dear, so at first the tower alone looks at single
things, then the whole model at parts of the canvas, each laid on its part of the position table; whole pictures come
last, while the rate sinks to zero. Several conversations about a picture lie in one sequence and do not see each other.
A killed call goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vtoken.accounting.compare import command
from vtoken.demo.clutter import DATA, PATCH, SIDE
from vtoken.demo.questions import BEGIN, END, IDS, IMAGE, KINDS, PAD, PLACES, VOCABULARY, ask, side_by_side
from vtoken.demo.scenes import CLOTHES, COLOURS, FIRST_DIGIT, PATCH_CLASSES, SMALL_KINDS, Material, Scenes
from vtoken.errors import VTokenError

CANVAS = SIDE // PATCH
# Sides in patches of what is seen, and shares of the steps: single things by the tower alone, then parts of the canvas.
CUT, CUT_SHARE = 6, 0.5
PART, PART_SHARE = 9, 0.35
MUON_RATE, ADAMW_RATE, WARM_UP = 0.004, 0.002, 50  # steps
ALONE = ("object", "place", "count", "count", "colour", "digit")  # conversations about every training picture
TWO_TURNS = ("object, then place", "digit, then place")  # and one of these
NAMING, SEEING = 0.5, 1.0  # weights of the losses of class token and patches beside that of the answers
KEEPING = 0.3  # and of what a patch must not forget over that: the colour of the tag, and where it lies itself
NOTHING = 0.1  # weight of patches that show only photograph, which are most


def build(width: int = 128) -> Any:
    """An untrained LLaVA: 14 x 14 patches and a class token, 5 blocks; a Llama of 4; about 2 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=5, num_attention_heads=width // 32,
        image_size=SIDE, patch_size=PATCH, hidden_act="gelu", projection_dim=width, attention_dropout=0.0,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=len(VOCABULARY), max_position_embeddings=512,
        bos_token_id=IDS[BEGIN], eos_token_id=IDS[END], pad_token_id=IDS[PAD], tie_word_embeddings=False,
    )  # fmt: skip
    # The last block's features, since the class token learns from them: its attention there says what it names.
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IDS[IMAGE], vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


class Heads(nn.Module):
    """What the tower learns from beside the answers; not part of the model that is saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.naming, self.seeing = nn.Linear(width, len(CLOTHES)), nn.Linear(width, PATCH_CLASSES)
        self.colouring, self.placing = nn.Linear(width, len(COLOURS)), nn.Linear(width, len(PLACES))


def numbers(corners: Tensor, grid: int) -> Tensor:
    """Which patches of the canvas the parts from `corners` [N, 2] on are made of, [N, grid * grid]."""
    rows, columns = (corners[:, :, None] + torch.arange(grid)).unbind(1)
    return (rows[:, :, None] * CANVAS + columns[:, None]).flatten(1)


def tower_rows(tower: Any, pictures: Tensor, corners: Tensor) -> Tensor:
    """Last hidden state [N, 1 + patches, C]; parts of the canvas take the positions from `corners` [N or 1, 2] on."""
    embed, grid = tower.embeddings, pictures.shape[-1] // PATCH
    patches = embed.patch_embedding(pictures).flatten(2).transpose(1, 2)
    prefix, table = embed.position_embedding.weight.split([1, CANVAS**2])
    positions = table[numbers(corners, grid)]
    first = (embed.class_embedding + prefix).expand(len(patches), 1, -1)
    hidden = torch.cat([first.to(patches.dtype), patches + positions], 1)
    return tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state


def cut(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three small parts of every whole picture: about the garment, the tag, and one of the small garments.

    Returns:
        Pictures [3 N, 3, side, side], the garments' first; corners in patches [3 N, 2]; what the patches show
        [3 N, patches]; what garment the first N show whole, [N]; and the colours of the tags [3 N].
    """
    count, grid = len(scenes.pictures), CUT
    which = torch.randint(2, scenes.boxes.shape[1], (count,), generator=generator)
    chosen = torch.cat([torch.zeros_like(which), torch.ones_like(which), which])
    owner = torch.arange(count).repeat(3)
    boxes = scenes.boxes[owner, chosen]
    boxes = torch.where(boxes[:, 3:] > 0, boxes, scenes.boxes[owner, 0])  # the garment where there is no such thing
    first = boxes[:, :2] // PATCH
    span = (boxes[:, :2] + boxes[:, 2:3] - 1) // PATCH - first + 1
    back = (torch.rand(span.shape, generator=generator) * (grid - span + 1)).long()
    corners = (first - back).clamp(0, CANVAS - grid)
    shown = scenes.patches[owner[:, None], numbers(corners, grid)]
    pixels = (corners[:, :, None] * PATCH + torch.arange(grid * PATCH)).unbind(1)
    pictures = scenes.pictures[
        owner[:, None, None, None],
        torch.arange(3)[:, None, None],
        pixels[0][:, None, :, None],
        pixels[1][:, None, None],
    ]
    return pictures, corners, shown, scenes.facts["garment"], scenes.facts["colour"][owner]


def sight_loss(
    model: Any, heads: Heads, rows: Tensor, corners: Tensor, shown: Tensor, garments: Tensor, colours: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The loss of patches and, on the first pictures, as many as there are garments, of the class token."""
    named = heads.naming(model.model.vision_tower.post_layernorm(rows[: len(garments), 0])).float()
    seen = heads.seeing(rows[:, 1:]).float()
    weights = torch.ones(PATCH_CLASSES).index_fill(0, torch.tensor(0), NOTHING)
    loss = NAMING * F.cross_entropy(named, garments)
    loss = loss + SEEING * F.cross_entropy(seen.flatten(0, 1), shown.flatten(), weights)
    tagged = shown >= FIRST_DIGIT
    painted = heads.colouring(rows[:, 1:])[tagged].float()
    loss = loss + KEEPING * F.cross_entropy(painted, colours[:, None].expand_as(shown)[tagged])
    number = numbers(corners, round(shown.shape[1] ** 0.5)).expand_as(shown)
    thirds = torch.stack([number // CANVAS, number % CANVAS]) * 3 // CANVAS
    placed = heads.placing(rows[:, 1:]).float()
    loss = loss + KEEPING * F.cross_entropy(placed.flatten(0, 1), (thirds[0] * 3 + thirds[1]).flatten())
    return loss, {
        "naming": float((named.argmax(-1) == garments).float().mean()),
        "seeing": float((seen.argmax(-1) == shown)[shown > 0].float().mean()),
        "seeing digits": float((seen.argmax(-1) == shown)[shown >= FIRST_DIGIT].float().mean()),
    }


def conversations(scenes: Scenes, kinds: Sequence[str], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """`ask` for every kind, counting a random kind of small garment."""
    count = len(scenes.pictures)
    return [
        ask(kind, scenes, torch.randint(len(SMALL_KINDS), (count,), generator=generator) if kind == "count" else None)
        for kind in kinds
    ]


def optimisers(model: Any, heads: Heads) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all blocks, AdamW for everything else."""
    blocks = [model.model.vision_tower.encoder.layers, model.model.language_model.layers]
    matrices = [p for part in blocks for p in part.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in chosen and p.requires_grad]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def losses(
    model: Any, heads: Heads, scenes: Scenes, kinds: Sequence[str], corners: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and shares of right answers by kind; of class token and patches too."""
    with torch.autocast("cpu", torch.bfloat16):
        rows = tower_rows(model.model.vision_tower, scenes.pictures, corners)
        talks = conversations(scenes, kinds, generator)
        features = model.model.multi_modal_projector(rows[:, 1:])
        parts = side_by_side(model, features, [ids for ids, _ in talks])
        loss, right = sight_loss(
            model, heads, rows, corners, scenes.patches, scenes.facts["garment"], scenes.facts["colour"]
        )
    labels = torch.cat([labels for _, labels in talks], 1)
    loss = loss + F.cross_entropy(torch.cat(parts, 1).float().flatten(0, 1), labels.flatten())
    for kind, found, (_, label) in zip(kinds, parts, talks, strict=True):
        # The last answer is told by the position before it.
        hit, known = found[:, -2].argmax(-1) == label[:, -2], label[:, -2] >= 0
        right[kind] = float(hit[known].float().mean())
    return loss, right


@torch.inference_mode()
def accuracy(model: Any, heads: Heads, material: Material, count: int, seed: int = 12345) -> dict[str, float]:
    """Shares of right answers on whole pictures."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    found: dict[str, list[float]] = {}
    for _ in range(max(1, count // 50)):
        scenes = material.draw(50, generator)
        for name, share in losses(model, heads, scenes, list(KINDS), torch.zeros(1, 2, dtype=torch.long), generator)[
            1
        ].items():
            found.setdefault(name, []).append(share)
    model.train()
    return {name: sum(shares) / len(shares) for name, shares in found.items()}


def train(args: argparse.Namespace, material: Material, test: Material, checkpoint: Path) -> tuple[Any, Heads, float]:
    """A model that saw `args.steps` batches, from the last checkpoint on if there is one; CPU seconds of all calls."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = build().train()
    model.set_attn_implementation("eager")  # the backward pass of the fused one is slow on the CPU
    heads = Heads(model.config.vision_config.hidden_size)
    opts = optimisers(model, heads)
    rates = [opt.param_groups[0]["lr"] for opt in opts]
    cuts = int(args.steps * CUT_SHARE)
    parts = cuts + int(args.steps * PART_SHARE)
    first, spent = 0, 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        heads.load_state_dict(saved["heads"])
        for opt, state in zip(opts, saved["optimisers"], strict=True):
            opt.load_state_dict(state)
        generator.set_state(saved["generator"])
        first, spent = saved["step"], saved["cpu_seconds"]
    start, began, mean = time.time(), time.process_time(), dict[str, float]()
    for step in range(first, args.steps):
        grid = CUT if step < cuts else PART if step < parts else CANVAS
        scale = min((step + 1) / WARM_UP, (args.steps - step) / (args.steps - parts), 1.0)
        for opt, rate in zip(opts, rates, strict=True):
            opt.param_groups[0]["lr"] = rate * scale
        if grid == CUT:
            pictures, corners, *told = cut(material.draw(args.batch, generator), generator)
            with torch.autocast("cpu", torch.bfloat16):
                rows = tower_rows(model.model.vision_tower, pictures, corners)
                loss, right = sight_loss(model, heads, rows, corners, *told)
        else:
            corners = torch.randint(CANVAS - grid + 1, (1, 2), generator=generator)
            scenes = material.draw(
                args.batch, generator, side=grid * PATCH, corner=(int(corners[0, 0]), int(corners[0, 1]))
            )
            kinds = [*ALONE, TWO_TURNS[step % len(TWO_TURNS)]]
            loss, right = losses(model, heads, scenes, kinds, corners, generator)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        for name, value in {"loss": float(loss.detach()), **right}.items():
            mean[name] = mean.get(name, value) + 0.05 * (value - mean.get(name, value))
        last = step + 1 == args.steps
        if step % 25 == 24 or last:
            told = ", ".join(f"{name} {value:.2f}" for name, value in mean.items())
            print(f"{step + 1}/{args.steps} grid {grid} {time.time() - start:.0f} s {told}", flush=True)
        if (step + 1) % args.save_every == 0 or last:
            partial = checkpoint.with_suffix(".partial")
            torch.save({
                "model": model.state_dict(), "heads": heads.state_dict(), "step": step + 1,
                "cpu_seconds": spent + time.process_time() - began,
                "optimisers": [opt.state_dict() for opt in opts], "generator": generator.get_state(),
            }, partial)  # fmt: skip
            partial.replace(checkpoint)
            told = ", ".join(f"{name} {value:.3f}" for name, value in accuracy(model, heads, test, 100).items())
            print(f"  held-back pictures: {told}", flush=True)
    return model, heads, spent + time.process_time() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure on test pictures, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000, help="batches")
    parser.add_argument("--batch", type=int, default=32, help="pictures")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the Fashion-MNIST files")
    parser.add_argument("--out", type=Path, default=Path("out/train_llava"), help="folder of model and checkpoint")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--test", type=int, default=2000, help="test pictures in the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a step per stage, to see that it runs")
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--small" in arguments:
        parser.set_defaults(steps=4, batch=4, test=50)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        material, test = Material("train", args.data), Material("test", args.data)
    except (VTokenError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    model, heads, seconds = train(args, material, test, args.out / "checkpoint.pt")
    right = accuracy(model, heads, test, args.test)
    about = {
        "command": command("examples/train_llava.py", arguments),
        "right": right,
        "test": f"{args.test} pictures of the test split",
        "cpu_minutes": round(seconds / 60, 1),
        "date": datetime.date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    save(model, args.out / "model", about)
    print(json.dumps(about, indent=1))
    return 0


def save(model: Any, folder: Path, about: dict[str, Any]) -> None:
    """Write what `from_pretrained` of model and `AutoProcessor` takes, weights in half precision, and how they came."""
    model = copy.deepcopy(model).eval().half()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")


def processor() -> Any:
    """Words to ids, pictures of 112 pixels to [-1, 1]: `processor(images=picture, text="<image> where is it ?")`."""
    words = Tokenizer(WordLevel(IDS, unk_token=PAD))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, IDS[BEGIN])])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=PAD, padding_side="left",
        extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip
    pixels = transformers.CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


if __name__ == "__main__":
    sys.exit(main())
