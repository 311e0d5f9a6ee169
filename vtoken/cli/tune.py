"""`python -m vtoken tune`: settings of a merging method for a target cost, chosen on a folder of images."""

from __future__ import annotations

import argparse
import json

import torch

from vtoken.cli import weights
from vtoken.cli.images import load_images
from vtoken.cli.settings import key_values
from vtoken.core.config import make_config
from vtoken.tuning.tune import tune


def run(args: argparse.Namespace) -> int:
    """Tune, print all that was tried, write the settings."""
    config = make_config(args.method, key_values(args.settings))
    torch.set_num_threads(args.threads)
    model = weights.build_model(args)
    images, _ = load_images(args, model)
    found = tune(
        model,
        images,
        args.target,
        config,
        milliseconds=args.milliseconds,
        batch=args.batch,
        limit=args.limit,
        rounds=args.rounds,
        seed=args.seed,
    )
    told = json.dumps(found.config.to_dict())
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(told + "\n")
    if args.json:
        print(json.dumps(found.to_dict()))
        return 0
    print(f"{args.model}, {weights.describe_weights(args)}, {len(images)} images of {args.data}")
    print(f"{found}\n{told}" + (f"\nwrote {args.out}" if args.out is not None else ""))
    return 0
