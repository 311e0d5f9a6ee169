"""Write the figures of README.md, docs/results.md and benchmarks/README.md from benchmarks/results/.

`python benchmarks/tables.py` rewrites what stands between `<!-- table: NAME -->` or `<!-- figure: NAME -->` and
`<!-- end -->`; `--check` changes nothing, prints how page and files differ, and exits with 1 if they do. So does
either if a page asks for a name or a file that is not there, or if a result file is used on no page.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vtoken.accounting import compare

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "benchmarks/README.md")
REGION = re.compile(r"(<!-- (?:table|figure): ([\w-]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
OPENING = re.compile(r"<!-- (?:table|figure): ")

Result = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table on lines of its own."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n" + "\n".join(lines) + "\n"


def demo(result: Result) -> str:
    """The table that `python -m vtoken demo` prints."""
    return f"\n```\n{result['about']}\n{compare.table([compare.Row.of(row) for row in result['rows']])}\n```\n"


def sparse(result: Result) -> str:
    """Times faster than dense attention, and times fewer multiply-adds, by tokens and keys kept."""
    found: dict[tuple[int, float], dict[str, Result]] = {}
    for row in result["rows"]:
        found.setdefault((row["tokens"], row["keep_ratio"]), {})[row["case"]] = row
    forms = ("sparse", "grouped", "sparse with selection", "grouped with selection")
    rows = [
        [str(tokens), f"{keep:.0%}"]
        + [f"{cases[form]['factor']:.2f} ({cases[form]['mac_factor']:.1f})" for form in forms]
        + [f"{cases['masked']['factor']:.2f}"]
        for (tokens, keep), cases in found.items()
    ]
    ends = ("operator, per query", "operator, grouped", "exact, end to end", "grouped, end to end", "masked")
    return markdown(("tokens", "keys kept", *ends), rows)


def sparse_figure(form: str, tokens: int, keep: float, field: str = "factor") -> Callable[[Result], str]:
    """One factor of `sparse`, for a sentence."""

    def figure(result: Result) -> str:
        wanted = (form, tokens, keep)
        (row,) = [row for row in result["rows"] if (row["case"], row["tokens"], row["keep_ratio"]) == wanted]
        digits = 2 if field == "factor" and row[field] < 1 else 1
        return f"{row[field]:.{digits}f}"

    return figure


def small(result: Result) -> str:
    """Speed-ups of small models and batches beside slicing."""
    rows = [
        [row["model"].removesuffix("_patch16_224"), str(row["batch"]), row["name"], f"{row['flops_factor']:.2f}"]
        + [f"{row[name]:.2f}" for name in ("speedup", "ceiling_speedup", "of_ceiling")]
        + [f"{row['targets']['of_ceiling']:.2f}{', missed' if 'of_ceiling' in row['missed'] else ''}"]
        + [f"{row['of_published']:.2f}" if "of_published" in row else ""]
        for row in result["rows"]
    ]
    head = ("model", "batch", "method", "FLOPs x", "speed x", "slicing x", "of slicing", "its target", "of published")
    return markdown(head, rows)


def compiling(result: Result) -> str:
    """What compiling costs and gives."""
    rows = [
        [row["name"], f"{row['compile_seconds']:.1f} s", f"{row['of_stock']:.2f}"]
        + [f"{row[name]:.2f}" for name in ("speedup_of_compiled", "speedup", "flops_factor")]
        for row in result["rows"]
    ]
    head = ("", "compiling", "of stock's", "speed x compiled stock", "x eager stock", "FLOPs x")
    return markdown(head, rows)


def small_speed(model: str, batch: int, method: str) -> Callable[[Result], str]:
    """One speed-up of `small`, for a sentence."""

    def figure(result: Result) -> str:
        wanted = (model, batch, method)
        (row,) = [row for row in result["rows"] if (row["model"], row["batch"], row["name"]) == wanted]
        return f"{row['speedup']:.2f}"

    return figure


def sparsifiner_top1(name: str, ratio: float) -> Callable[[Result], str]:
    """One mean of `sparsifiner`, for a sentence."""

    def figure(result: Result) -> str:
        at = result["ratios"].index(ratio)
        return f"{statistics.mean(run['top1'][name][at] for run in result['runs']):.1f}"

    return figure


def mllm_prefill(family: str, kept: int) -> Callable[[Result], str]:
    """The time of a family's prefill with fewer image tokens, as a share."""

    def figure(result: Result) -> str:
        wanted = ("prefill", family, kept)
        (row,) = [row for row in result["rows"] if (row["part"], row.get("family"), row["kept"]) == wanted]
        return f"{row['prefill_ratio']:.3f}"

    return figure


def training_time(name: str) -> Callable[[Result], str]:
    """The time of a training step, plain CLIP = 1."""

    def figure(result: Result) -> str:
        (row,) = [row for row in result["rows"] if row["name"] == name]
        return f"{row['time_ratio']:.2f}"

    return figure


def video_prefill(share: float) -> Callable[[Result], str]:
    """FLOPs of the prefill under a budget, as a share."""

    def figure(result: Result) -> str:
        (row,) = [row for row in result["rows"] if row["part"] == "prefill" and row["share"] == share]
        return f"{row['flops_ratio']:.3f}"

    return figure


def sparsifiner(result: Result) -> str:
    """Top-1 by keys kept, means over seeds, and paired differences with the larger of two standard errors."""
    runs, canvases = result["runs"], int(result["settings"]["test"])

    def means(title: str, name: str) -> list[str]:
        columns = zip(*(run["top1"][name] for run in runs), strict=True)
        return [title, *(f"{statistics.mean(column):.1f}" for column in columns)]

    def gaps(title: str, how: str) -> list[str]:
        cells = [title]
        for i in range(len(result["ratios"])):
            gap = [run["top1"][f"learned{how}"][i] - run["top1"][f"random{how}"][i] for run in runs]
            differ = sum(run["disagreements"][how][i] for run in runs)
            seeds, pictures = statistics.stdev(gap) / len(runs) ** 0.5, 100 * differ**0.5 / (canvases * len(runs))
            cells.append(f"{statistics.mean(gap):+.1f} +- {max(seeds, pictures):.1f}" if differ else "0")
        return cells

    rows = [
        means("dense model", "dense"),
        means("random masks", "random"),
        means("learned masks", "learned"),
        gaps("learned - random", ""),
        means("random masks, backbone tuned", "random, tuned"),
        means("learned masks, backbone tuned", "learned, tuned"),
        gaps("learned - random, both tuned", ", tuned"),
    ]
    return markdown(["keys kept", *(f"{100 * ratio:.0f} %" for ratio in result["ratios"])], rows)


def clip(result: Result) -> str:
    """Zero-shot accuracy by setting, task and budget; cost of a step on the garments."""
    found = {(row["setting"], row["task"], row["budget"]): row for row in result["rows"]}
    rows = []
    for setting in result["settings"]["setting"]:
        cells = ["plain CLIP" if setting == "CLIP" else setting]
        for task in ("digits", "garments"):
            for budget in ("steps", "FLOPs"):
                row = found.get((setting, task, budget))
                cells.append(f"{row['accuracy_mean']:.3f} +- {row['accuracy_sd']:.3f}" if row else "")
        step = found[setting, "garments", "steps"]
        cost = (step["step_macs"], step["step_time"])
        rows.append([*cells, ", ".join("1" if value == 1 else f"{value:.2f}" for value in cost)])
    budgets = ("digits, equal steps", "equal multiply-adds", "garments, equal steps", "equal multiply-adds")
    return markdown(("kept: half of 64 patches", *budgets, "step: MACs, time"), rows)


def training(result: Result) -> str:
    """What a CLIP training step costs; plain CLIP = 1."""
    fields = ("mac_ratio", "mac_ratio_counted", "time_ratio", "gradients_time_ratio", "step_bytes_ratio")
    rows = [
        [row["name"].replace("random 50 %", "random 50 %, no teacher"), *(f"{row[field]:.2f}" for field in fields)]
        for row in result["rows"][1:]
    ]
    head = ("", "formula", "counted", "time", "forward and backward", "activations and gradients")
    return markdown(head, rows)


def answers(tokens: int) -> Callable[[Result], str]:
    """Right answers in percent by kind at one count of image tokens; what differs from a uniform grid is marked."""

    def table(result: Result) -> str:
        whole = result["rows"][0]
        kinds = list(whole["kinds"])
        chosen = [row for row in result["rows"] if row["budget"] == tokens]
        rows = [["most frequent answer", "", *(f"{100 * whole['guess'][kind]:.1f}" for kind in kinds), "", ""]]
        for row in (whole, *chosen):
            placed = ", places kept" if row["positions"] == "original" else ""
            cells = [row["name"] + placed, str(row["tokens"])]
            for kind in kinds:
                found, mark = row["kinds"][kind], ""
                gap = found.get("over_uniform")
                if gap and abs(gap["mean"]) > gap["half"]:
                    mark = " +" if gap["mean"] > 0 else " -"
                cells.append(f"{100 * found['right']:.1f}{mark}")
            share = row["call_gmacs"] / whole["call_gmacs"]
            rows.append([*cells, f"{row['prefill_gmacs'] / whole['prefill_gmacs']:.2f}",
                         f"{share:.2f}, {row['time_ratio']:.2f}"])  # fmt: skip
        return markdown(("", "tokens", *kinds, "prefill: MACs", "call: MACs, time"), rows)

    return table


def answered(name: str, tokens: int, kind: str, positions: str = "original") -> Callable[[Result], str]:
    """One share of right answers in per cent, for a sentence."""

    def figure(result: Result) -> str:
        wanted = (name, tokens, positions)
        (row,) = [row for row in result["rows"] if (row["name"], row["budget"], row["positions"]) == wanted]
        return f"{100 * row['kinds'][kind]['right']:.1f}"

    return figure


def quota_answers(result: Result) -> str:
    """Right answers about videos in percent, and by how many points more than with uniform tokens and frames."""
    whole = result["rows"][0]
    kinds = list(whole["kinds"])
    rows = [["", "most frequent answer", *(f"{100 * whole['guess'][kind]:.1f}" for kind in kinds[:-1]), "", "", "", ""]]
    for row in result["rows"]:
        told = row["kinds"]
        cells = [str(row["budget"]), row["name"], *(f"{100 * told[kind]['right']:.1f}" for kind in kinds)]
        cells += [
            points(told["all"][field]) if field in told["all"] else "" for field in ("over_tokens", "over_frames")
        ]
        tokens = statistics.mean(told[kind]["needle_tokens"] for kind in kinds[:-1])  # of questions that are as many
        rows.append([*cells, f"{tokens:.0f}"])
    return markdown(("tokens", "", *kinds, "over uniform tokens", "over uniform frames", "on the needle"), rows)


def points(gap: Result) -> str:
    """A paired difference in points with its 95 % interval."""
    return f"{100 * gap['mean']:+.1f} +- {100 * gap['half']:.1f}"


def quota_gap(budget: int, name: str, field: str, kind: str = "all") -> Callable[[Result], str]:
    """One difference of `quota_answers`, for a sentence."""

    def figure(result: Result) -> str:
        (row,) = [row for row in result["rows"] if (row["budget"], row["name"]) == (budget, name)]
        return points(row["kinds"][kind][field])

    return figure


def quota_share(budget: int, name: str, field: str = "right", kind: str = "all") -> Callable[[Result], str]:
    """One share of `quota_answers` in percent, for a sentence."""

    def figure(result: Result) -> str:
        (row,) = [row for row in result["rows"] if (row["budget"], row["name"]) == (budget, name)]
        return f"{100 * row['kinds'][kind][field]:.1f}"

    return figure


def quota_time(name: str, budget: int) -> Callable[[Result], str]:
    """The time of a call with that of the scorer, the whole video's = 1."""

    def figure(result: Result) -> str:
        (row,) = [row for row in result["rows"] if (row["budget"], row["name"]) == (budget, name)]
        return f"{(row['milliseconds'] + row['scorer_milliseconds']) / result['rows'][0]['milliseconds']:.1f}"

    return figure


def quota_cost(result: Result) -> str:
    """Multiply-adds and times of a call about a video beside those of the whole video, and the scorer's, apart."""
    whole, rows = result["rows"][0], []
    for row in result["rows"]:
        if row["name"] in ("whole video", "uniform frames", "QuoTA, clue"):
            name = "every frame, by CLIP" if row["name"] == "QuoTA, clue" else row["name"]
            shares = [row[field] / whole[field] for field in ("prefill_gmacs", "call_gmacs", "milliseconds")]
            scoring = [row["scorer_gmacs"] / whole["call_gmacs"], row["scorer_milliseconds"] / whole["milliseconds"]]
            cells = [f"{share:.2f}" for share in shares] + [f"{share:.2f}" if share else "" for share in scoring]
            rows.append([str(row["budget"]), name, *cells])
    head = ("tokens", "", "prefill: MACs", "tower and prefill: MACs", "call: time", "scorer: MACs", "scorer: time")
    return markdown(head, rows)


def dense(result: Result) -> str:
    """Saliency on merged features: correlation with the unmerged map, mean absolute difference from it, by ratio."""
    found = {row["name"]: row for row in result["rows"]}
    rows = []
    for ratio in result["settings"]["ratio"]:
        pair = [found[f"{method} ratio={ratio}"] for method in ("pitome", "tome")]
        factors = dict.fromkeys(f"{row['flops_factor']:.2f}" for row in pair)
        quality = [
            ", ".join(f"{row['quality'][name]['mean']:.3f}" for name in ("saliency corr", "saliency err"))
            for row in pair
        ]
        rows.append([f"ratio {ratio}", " and ".join(factors), *quality])
    return markdown(("", "FLOPs factor", "PiToMe", "ToMe"), rows)


def clutter(result: Result) -> str:
    """Top-1 on cluttered garments by ratio: mean and spread over seeds."""
    found = {row["name"]: row for row in result["rows"]}
    methods = {"pitome": "PiToMe", "tome": "ToMe", "random_merge": "random merging", "random_prune": "random pruning"}

    def top1(name: str) -> str:
        quality = found[name]["quality"]["top-1"]
        return f"{quality['mean']:.3f} +- {quality['spread']:.3f}"

    rows = [["unpatched", "1", top1("unpatched"), "", "", ""]]
    for ratio in result["settings"]["ratio"]:
        names = [f"{method} ratio={ratio:g}" for method in methods]
        factors = sorted(found[name]["flops_factor"] for name in names)
        rows.append([f"ratio {ratio}", f"{factors[0]:.2f} to {factors[-1]:.2f}", *map(top1, names)])
    return markdown(("", "FLOPs factor", *methods.values()), rows)


def quality(name: str, field: str, *, factor: bool = False) -> Callable[[Result], str]:
    """One mean of `quality.py`, or its FLOPs factor, for a sentence."""

    def figure(result: Result) -> str:
        (row,) = [row for row in result["rows"] if row["name"] == name]
        return f"{row['flops_factor']:.2f}" if factor else f"{row['quality'][field]['mean']:.3f}"

    return figure


def video(result: Result) -> str:
    """The prefill under a budget, by share of the usual tokens of a frame."""
    rows = [
        ["1", "1", "1"] if row["share"] == 1 else
        [f"{row['share']:g}", f"{row['flops_ratio']:.3f}", f"{row['time_ratio']:.3f}"]
        for row in result["rows"] if row["part"] == "prefill"
    ]  # fmt: skip
    return markdown(("budget, of the default 196 tokens a frame", "FLOPs of the prefill", "time"), rows)


def video_flops(budget: int, scorer: str, digits: int) -> Callable[[Result], str]:
    """FLOPs of 96 frames by budget and scorer, against the model's own 64 frames."""

    def figure(result: Result) -> str:
        wanted = ("QuoTA, 96 frames", budget, scorer)
        rows = [row for row in result["rows"] if row["part"] == "published"]
        (row,) = [row for row in rows if (row["name"], row["budget"], row["scorer"]) == wanted]
        return f"{row['of_baseline']:.{digits}f}"

    return figure


def video_milliseconds(name: str, frames: int, *, each: bool = False) -> Callable[[Result], str]:
    """What allocating or resampling takes, in all or for each frame."""

    def figure(result: Result) -> str:
        rows = [row for row in result["rows"] if row["part"] in ("allocation", "resampling")]
        (row,) = [row for row in rows if (row["name"], row["frames"]) == (name, frames)]
        return f"{row['seconds'] * 1e3 / (frames if each else 1):.1f}"

    return figure


def prompts(result: Result) -> str:
    """What LLaVA's first pass takes with fewer image tokens."""
    rows = []
    for row in (row for row in result["rows"] if row["part"] == "prefill" and row["family"] == "llava"):
        memory = [f"{row[name] / 2**20:.0f}" for name in ("peak_bytes", "cache_bytes")]
        if "mac_ratio" in row:
            ratios = [f"{row[name]:.3f}" for name in ("mac_ratio", "prefill_ratio", "call_ratio")]
        else:
            ratios = ["1", f"1 ({row['prefill_seconds']:.2f} s)", "1"]
        rows.append([str(row["kept"]), *ratios, *memory])
    parts = ("multiply-adds of the prefill", "time of the prefill", "time of the whole call")
    return markdown(("kept", *parts, "peak MiB", "cache MiB"), rows)


def families(result: Result) -> str:
    """A third of the image tokens in every family: times beside multiply-adds, and who takes them."""
    rows = []
    for row in (row for row in result["rows"] if row["part"] == "prefill"):
        swept = row["family"] == "llava" and 3 * row["kept"] != row["tokens"]  # its other counts have a table
        if "mac_ratio" not in row or swept:
            continue
        rows.append(
            [row["family"], f"{row['kept']} of {row['tokens']}"]
            + [f"{row[name]:.3f}" for name in ("mac_ratio", "prefill_ratio", "call_ratio")]
            + [f"{row[name]:.1%}" for name in ("tower_share", "watch_share")]
            + [f"{row[name]:.2%}" for name in ("choose_share", "engine_share")]
            + [f"{row['keep_all_ratio']:.3f}{', missed' if 'keep_all_ratio' in row['missed'] else ''}"]
        )
    times = ("multiply-adds", "time", "whole call")
    return markdown(("family", "kept", *times, "tower", "reading", "choosing", "engine", "keep all"), rows)


def choosing(result: Result) -> str:
    """What each method takes to choose, beside the tower."""
    rows = [
        [row["name"]]
        + [f"{1e3 * row[f'{form}seconds']:.1f} ({row[f'{form}of_tower']:.1%})" for form in ("", "one_grid_")]
        + [f"{row['watch_of_tower']:.1%}" if row["watch_of_tower"] else ""]
        for row in result["rows"]
        if row["part"] == "choice"
    ]
    return markdown(("", "five grids of 576, ms (of the tower)", "one grid of 2880", "reading the tower"), rows)


def tower_seconds(result: Result) -> str:
    """What the tower of the methods' table takes."""
    return next(f"{row['tower_seconds']:.1f}" for row in result["rows"] if row["part"] == "choice")


def serving(result: Result) -> str:
    """What vLLM's engine does with all image tokens and with fewer."""
    rows = [
        [
            row["name"], f"{row['prompt_tokens']}", f"{row['cache_bytes'] / 2**20:.1f}",
            f"{row['requests_per_second']:.2f}", f"{row['speedup']:.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(("", "tokens of a prompt", "its cache, MiB", "requests a CPU second", "times as many"), rows)


def tuned(result: Result) -> str:
    """What tuned schedules change on images that tuning never saw, beside constant ones of equal FLOPs."""
    rows = []
    for row in (row for row in result["rows"] if row["part"] == "summary"):
        cells = [row["method"], f"{row['target']:.0%}", *(f"{row['means'][n]['change']:.2e}" for n in row["means"])]
        for gap in row["against"].values():
            low, high = (gap["difference"] + side * gap["half"] for side in (-1, 1))
            sure = "" if low <= 0 <= high else ", sure"
            cells.append(f"{gap['quotient']:.2f} ({low:+.1e} to {high:+.1e}{sure})")
        if "top1" in row["means"]["tuned"]:
            cells.append(", ".join(f"{means['top1']:.3f}" for means in row["means"].values()))
        rows.append([*cells, ", ".join(row["forms"])])
    head = ["", "FLOPs", "one ratio", "one r", "tuned", "of one ratio's (95 %)", "of one r's (95 %)"]
    head += ["top-1 of the three"] if len(rows[0]) > len(head) + 1 else []
    return markdown((*head, "what tuning took, by seed"), rows)


def sources(results: Path, problems: list[str]) -> str:
    """Which command gave which result file, when and on what; files that do not say so are added to `problems`."""
    rows = []
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        where = result.get("environment", {})
        if missing := {"command", "date", "torch", "threads"} - {*result, *where}:
            problems.append(f"{path} does not say its {', '.join(sorted(missing))}")
            continue
        threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
        rows.append([f"`{path.name}`", f"`{result['command']}`", where["date"],
                     f"torch {where['torch'].split('+')[0]}, {threads}"])  # fmt: skip
    return markdown(("file", "command", "day", "on"), rows)


def torch_version(result: Result) -> str:
    """The release of torch that gave the figures."""
    return str(result["environment"]["torch"]).split("+")[0]


# Name on a page -> file under benchmarks/results, and what makes text of it.
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "pitome-speed": ("small.json", small_speed("vit_base_patch16_224", 8, "pitome")),
    "sparsifiner-quarter": ("train_sparsifiner.json", sparsifiner_top1("learned", 0.25)),
    "sparsifiner-dense": ("train_sparsifiner.json", sparsifiner_top1("dense", 0.25)),
    "prefill-64": ("mllm.json", mllm_prefill("llava", 64)),
    "attentive-time": ("training.json", training_time("1 x 50 %")),
    "quota-quarter": ("video.json", video_prefill(0.25)),
    "demo": ("demo.json", demo),
    "demo-torch": ("demo.json", torch_version),
    "dense": ("quality_dense.json", dense),
    **{
        f"dense-{side}": ("quality_dense.json", quality(f"low resolution {side} px", "saliency corr"))
        for side in (168, 126)
    },
    **{
        f"dense-{side}-flops": ("quality_dense.json", quality(f"low resolution {side} px", "", factor=True))
        for side in (168, 126)
    },
    "clutter": ("quality_clutter.json", clutter),
    "clutter-stride": ("quality_clutter.json", quality("stride 2", "top-1")),
    "clutter-stride-flops": ("quality_clutter.json", quality("stride 2", "", factor=True)),
    "clutter-80": ("quality_clutter.json", quality("low resolution 80 px", "top-1")),
    "clutter-80-flops": ("quality_clutter.json", quality("low resolution 80 px", "", factor=True)),
    "mllm": ("mllm.json", prompts),
    "mllm-families": ("mllm.json", families),
    "mllm-choice": ("mllm.json", choosing),
    "mllm-tower": ("mllm.json", tower_seconds),
    "serving": ("serving.json", serving),
    "video": ("video.json", video),
    "video-clip": ("video.json", video_flops(12544, "CLIP ViT-L/14", 2)),
    "video-clip-half": ("video.json", video_flops(6272, "CLIP ViT-L/14", 2)),
    "video-2b": ("video.json", video_flops(12544, "2B LVLM, 256 tokens a frame", 1)),
    "video-2b-720p": ("video.json", video_flops(12544, "2B LVLM, 720p", 1)),
    "allocate-96": ("video.json", video_milliseconds("exact", 96)),
    "allocate-1000": ("video.json", video_milliseconds("exact", 1000)),
    "resample-frame": ("video.json", video_milliseconds("bilinear", 32, each=True)),
    **{f"answers-{tokens}": ("answers.json", answers(tokens)) for tokens in (98, 49, 22, 12)},
    "answers-whole-place": ("answers.json", answered("whole image", 196, "place", "compact")),
    "answers-vtc-place-98": ("answers.json", answered("VTC-CLS", 98, "place")),
    "answers-vtc-place-98-compact": ("answers.json", answered("VTC-CLS", 98, "place", "compact")),
    "answers-uniform-place-98-compact": ("answers.json", answered("uniform grid", 98, "place", "compact")),
    "answers-vtc-object-12": ("answers.json", answered("VTC-CLS", 12, "object")),
    "answers-uniform-object-12": ("answers.json", answered("uniform grid", 12, "object")),
    "answers-tome-object-12": ("answers.json", answered("ToMe", 12, "object", "compact")),
    "answers-vtc-count-49": ("answers.json", answered("VTC-CLS", 49, "count")),
    "answers-uniform-count-49": ("answers.json", answered("uniform grid", 49, "count")),
    "answers-vtc-digit-49": ("answers.json", answered("VTC-CLS", 49, "digit")),
    "answers-uniform-digit-49": ("answers.json", answered("uniform grid", 49, "digit")),
    "answers-vtc-digit-22": ("answers.json", answered("VTC-CLS", 22, "digit")),
    "answers-vtc-colour-22": ("answers.json", answered("VTC-CLS", 22, "colour")),
    "answers-uniform-digit-22": ("answers.json", answered("uniform grid", 22, "digit")),
    "answers-uniform-colour-22": ("answers.json", answered("uniform grid", 22, "colour")),
    "answers-div-digit-12": ("answers.json", answered("DivPrune", 12, "digit")),
    "answers-div-colour-12": ("answers.json", answered("DivPrune", 12, "colour")),
    "answers-tome-digit-49": ("answers.json", answered("ToMe", 49, "digit", "compact")),
    "answers-pitome-digit-49": ("answers.json", answered("PiToMe", 49, "digit", "compact")),
    "quota-answers": ("quota_answers.json", quota_answers),
    "quota-cost": ("quota_answers.json", quota_cost),
    "quota-time": ("quota_answers.json", quota_time("QuoTA, rule", 49)),
    "quota-whole": ("quota_answers.json", quota_share(784, "whole video")),
    "quota-sixteenth": ("quota_answers.json", quota_share(49, "QuoTA, rule")),
    **{f"quota-{b}": ("quota_answers.json", quota_gap(b, "QuoTA, rule", "over_tokens")) for b in (196, 98, 49)},
    **{f"quota-frames-{b}": ("quota_answers.json", quota_gap(b, "QuoTA, rule", "over_frames")) for b in (196, 49)},
    **{f"quota-random-{b}": ("quota_answers.json", quota_gap(b, "random scores", "over_tokens")) for b in (196, 49)},
    **{f"quota-rule-{b}": ("quota_answers.json", quota_gap(b, "QuoTA, rule", "over_question")) for b in (196, 98, 49)},
    **{
        f"quota-{kind}-{short}": ("quota_answers.json", quota_gap(196, name, "over_tokens", kind))
        for kind in ("count", "beside")
        for short, name in (("rule", "QuoTA, rule"), ("true", "QuoTA, true relevance"))
    },
    "quota-beside-clue": ("quota_answers.json", quota_gap(196, "QuoTA, rule", "over_question", "beside")),
    "quota-beside-whole": ("quota_answers.json", quota_share(784, "whole video", kind="beside")),
    **{
        f"quota-first-{kind}-{short}": ("quota_answers.json", quota_share(98, name, "needle_first", kind))
        for kind in ("digit", "place", "count")
        for short, name in (("question", "QuoTA, question"), ("clue", "QuoTA, clue"))
    },
    "sparsifiner": ("train_sparsifiner.json", sparsifiner),
    "clip": ("train_clip.json", clip),
    "clip-fresh": ("train_clip_fresh.json", clip),
    "training": ("training.json", training),
    "tune": ("tune.json", tuned),
    "tune-dense": ("tune_dense.json", tuned),
    "small": ("small.json", small),
    "compile": ("compile.json", compiling),
    "sparse": ("sparse_attention.json", sparse),
    "exact-2305": ("sparse_attention.json", sparse_figure("sparse with selection", 2305, 0.1)),
    "exact-2305-macs": ("sparse_attention.json", sparse_figure("sparse with selection", 2305, 0.1, "mac_factor")),
    "exact-2305-5": ("sparse_attention.json", sparse_figure("sparse with selection", 2305, 0.05)),
    "exact-2305-5-macs": ("sparse_attention.json", sparse_figure("sparse with selection", 2305, 0.05, "mac_factor")),
    "grouped-577": ("sparse_attention.json", sparse_figure("grouped with selection", 577, 0.1)),
    "grouped-577-macs": ("sparse_attention.json", sparse_figure("grouped with selection", 577, 0.1, "mac_factor")),
    "grouped-1025": ("sparse_attention.json", sparse_figure("grouped with selection", 1025, 0.1)),
    "grouped-1025-macs": ("sparse_attention.json", sparse_figure("grouped with selection", 1025, 0.1, "mac_factor")),
    "grouped-2305": ("sparse_attention.json", sparse_figure("grouped with selection", 2305, 0.1)),
    "grouped-2305-macs": ("sparse_attention.json", sparse_figure("grouped with selection", 2305, 0.1, "mac_factor")),
}


def rewritten(text: str, results: Path, used: set[str], problems: list[str]) -> str:
    """`text` with every region made anew; files read are added to `used`, regions without one to `problems`."""

    def region(match: re.Match[str]) -> str:
        opening, name, _, end = match.groups()
        if name == "sources":
            return opening + sources(results, problems) + end
        if name not in TABLES:
            problems.append(f"{opening}: no such table or figure; there are {', '.join(TABLES)}")
            return match[0]
        file, make = TABLES[name]
        if not (results / file).is_file():
            problems.append(f"{opening}: {results / file} does not exist")
            return match[0]
        used.add(file)
        return opening + make(json.loads((results / file).read_text())) + end

    if len(OPENING.findall(text)) != len(REGION.findall(text)):
        problems.append("a table or figure is opened and not closed by <!-- end -->")
    return REGION.sub(region, text)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check the pages under `root`; the exit code."""
    top = argparse.ArgumentParser(prog="benchmarks/tables.py", description=__doc__.split("\n")[0] if __doc__ else None)
    top.add_argument("--check", action="store_true", help="change nothing; exit with 1 if page and files differ")
    args = top.parse_args(argv)
    results, used, problems, differ = root / "benchmarks" / "results", set[str](), list[str](), False
    for page in PAGES:
        old = (root / page).read_text()
        new = rewritten(old, results, used, problems)
        if new != old and args.check:
            differ = True
            names = (page, f"{page}, from the result files")
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), *names))
        elif new != old:
            (root / page).write_text(new)
            print(f"wrote {page}")
    for path in sorted(results.glob("*.json")):
        if path.name not in used:
            problems.append(f"{path} is used on no page")
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return int(differ or bool(problems))


if __name__ == "__main__":
    sys.exit(main())
