"""From a question to a token budget on a clip, offline: a small CLIP that reads, a clip of known content, a picture.

    python examples/video_question.py            # trains for some minutes on one core, then asks
    python examples/video_question.py --small    # seconds, to see that it runs; the model has learnt nothing then

No image-text weights can be had without a hub, so a small CLIP learns the ten garments of Fashion-MNIST on photographs
from captions. The clip shows garments that it has not seen, on photographs that it has not seen, and stretches without
any, as an H.264 or MPEG-4 file; the rest is `python -m vtoken video`. As the content is known, so is the share of the
tokens that went to frames that show what was asked for. Data: Debian's dataset-fashion-mnist and scikit-image.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vtoken.__main__ import main as command
from vtoken.demo.clutter import DATA, read_fashion_mnist
from vtoken.demo.photos import load_photographs

NAMES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NOTHING = ("nothing", "no garment", "an empty scene", "a photo of a place")
CAPTIONS = ("{}", "a {}", "the {}", "a photo of a {}", "there is a {}", "the {} is seen")
LEARNT, HELD_OUT = (
    ("astronaut", "coffee", "rocket", "coins", "retina", "camera"),
    ("chelsea", "motorcycle", "clock", "moon"),
)
SIDE, FPS = 64, 12
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
SCENES = (None, 8, 3, None, 1, 9, 5, None, 9, 2)  # garments of the clip, one per scene, by their label


def scene(photos: Tensor, garments: Tensor, shown: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures [N, 3, 64, 64]: a random piece of a photograph with one garment on it, or none.

    Args:
        photos: [P, 3, S, S] in [0, 1].
        garments: [N, 28, 28] uint8.
        shown: whether there is one, [N] bool.
    """
    pictures = []
    for garment, there in zip(garments, shown.tolist(), strict=True):
        size = int(torch.randint(SIDE, photos.shape[-1], (1,), generator=rng))
        top, left = (int(torch.randint(photos.shape[-1] - size + 1, (1,), generator=rng)) for _ in range(2))
        photo = photos[int(torch.randint(len(photos), (1,), generator=rng))]
        piece = F.interpolate(photo[None, :, top : top + size, left : left + size], SIDE, mode="area")[0]
        place = torch.rand(3, generator=rng).tolist() if there else None
        tint = 0.5 + 0.5 * torch.rand(3, 1, 1, generator=rng)
        pictures.append(piece if place is None else put_on(piece, garment, place, tint))
    return torch.stack(pictures)


def put_on(picture: Tensor, garment: Tensor, place: Sequence[float], tint: Tensor) -> Tensor:
    """The picture [3, h, w] with the garment on it; `place` is down, across and size, each in [0, 1]."""
    side = picture.shape[-1]
    size = round(side * (0.5 + 0.35 * place[2]))
    top, left = round((side - size) * place[0]), round((side - size) * place[1])
    cloth = F.interpolate(garment[None, None].float() / 255, size, mode="bilinear")[0]
    cover = (cloth * 5).clamp(max=1)
    out = picture.clone()
    under = out[:, top : top + size, left : left + size]
    out[:, top : top + size, left : left + size] = under * (1 - cover) + tint * cloth * cover
    return out


def train(folder: Path, steps: int, batch: int, data: Path) -> float:
    """Train a small CLIP, write it as an open_clip folder; its accuracy on held-out garments and photographs.

    Each step pairs a batch of pictures with one caption of each kind of content.
    """
    rng, words = torch.Generator().manual_seed(0), random.Random(0)
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    images, labels = read_fashion_mnist("train", data)
    photos = load_photographs(256, LEARNT)[1]
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-3, total_steps=steps, pct_start=min(0.1, 2 / steps))
    bar = tqdm(range(steps), desc="learning to read garments")
    for _ in bar:
        pick = torch.randint(len(images), (batch,), generator=rng)
        shown = torch.rand(batch, generator=rng) < 0.9
        pixels = normalised(scene(photos, images[pick], shown, rng))
        target = torch.where(shown, labels[pick], len(NAMES))
        texts = [words.choice(CAPTIONS).format(name) for name in NAMES] + [words.choice(NOTHING)]
        pictures, captions = (
            model.encode_image(pixels, normalize=True),
            model.encode_text(tokenizer(texts), normalize=True),
        )
        loss = F.cross_entropy(model.logit_scale.exp().clamp(max=50) * pictures @ captions.T, target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        plan.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": about}, indent=1))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return accuracy(model.eval(), tokenizer, data, count=100 if steps < 100 else 2000)


def normalised(pixels: Tensor) -> Tensor:
    """As open_clip's own preprocessing does."""
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (pixels - mean) / std


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, data: Path, count: int) -> float:
    """Share of held-out pictures whose nearest caption is right."""
    rng = torch.Generator().manual_seed(1)
    images, labels = read_fashion_mnist("test", data)
    shown = torch.arange(count) % 11 < 10
    pixels = normalised(scene(load_photographs(256, HELD_OUT)[1], images[:count], shown, rng))
    texts = model.encode_text(tokenizer([*NAMES, NOTHING[0]]), normalize=True)
    best = torch.cat([model.encode_image(part, normalize=True) @ texts.T for part in pixels.split(100)]).argmax(1)
    return float((best == torch.where(shown, labels[:count], len(NAMES))).float().mean())


def write_clip(path: Path, data: Path, side: int = 160, seconds: float = 3.0) -> list[int | None]:
    """A clip of the scenes, garments wandering over panned photographs; which garment every frame shows."""
    import av

    rng = random.Random(4)
    images, labels = read_fashion_mnist("test", data)
    photos = load_photographs(side + 48, HELD_OUT)[1]
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    truth: list[int | None] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width = stream.height = side
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1_500_000
        for number, label in enumerate(SCENES):
            garment = None if label is None else images[rng.choice((labels == label).nonzero().flatten().tolist())]
            tint = torch.tensor([rng.uniform(0.5, 1) for _ in range(3)]).view(3, 1, 1)
            start, end = ([rng.random() for _ in range(3)] for _ in range(2))
            for step in np.linspace(0, 1, round(seconds * FPS)):
                pan = round(48 * float(step))
                picture = photos[number % len(photos)][:, 24 : 24 + side, pan : pan + side]
                if garment is not None:
                    place = [a + (b - a) * float(step) for a, b in zip(start, end, strict=True)]
                    picture = put_on(picture, garment, place, tint)
                pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = len(truth), Fraction(1, FPS)
                container.mux(stream.encode(frame))
                truth.append(label)
        container.mux(stream.encode())
    return truth


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train (or take what is there), write the clip, ask; the shares of frames and of tokens that show the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/video_question"), help="folder for model, clip, picture")
    parser.add_argument("--question", default="When does the ankle boot appear?", help="about one of the garments")
    parser.add_argument("--budget", default="0.25", help="tokens, or share of the default ones")
    parser.add_argument("--steps", type=int, default=600, help="of training; a folder with a model is used as it is")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of Fashion-MNIST")
    parser.add_argument("--small", action="store_true", help="twenty steps")
    args = parser.parse_args(argv)
    folder, clip, scores = args.out / "clip", args.out / "garments.mp4", args.out / "scores.json"
    if not (folder / "open_clip_model.safetensors").is_file():
        found = train(folder, 20 if args.small else args.steps, 32 if args.small else 64, args.data)
        print(f"held-out garments on held-out photographs: {found:.1%} named right (chance 9 %)")
    truth = write_clip(clip, args.data)
    asked = ["video", str(clip), "--question", args.question, "--budget", args.budget, "--model", f"local-dir:{folder}"]
    code = command([*asked, "--out", str(args.out / "video.png")])
    if code:
        raise SystemExit(code)
    return judge(asked, truth, args.question, scores)


def judge(asked: list[str], truth: list[int | None], question: str, path: Path) -> dict[str, float]:
    """How much of the budget went to the frames that show the garment in the question."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        command([*asked, "--json"])
    path.write_text(text.getvalue())
    found = json.loads(text.getvalue())
    shows = [truth[i] is not None and NAMES[truth[i]] in question for i in found["frames"]]
    shares = {
        "frames": sum(shows) / len(shows),
        "tokens": sum(t for t, there in zip(found["tokens"], shows, strict=True) if there) / sum(found["tokens"]),
    }
    print(f"frames that show it: {shares['frames']:.0%} of the frames, {shares['tokens']:.0%} of the tokens")
    return shares


if __name__ == "__main__":
    main()
