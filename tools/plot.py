"""A PNG of: the curves of runs; an ablation's rows in a plane of two measures; where shapes stand; a strip.

    python tools/plot.py runs/yoso --png curves.png
    python tools/plot.py runs/ablate/yoso/yoso-seed0 runs/ablate/yoso/ufogen-seed0 --keys L_D L_adv
    python tools/plot.py runs/ablate/diff_instruct_star --arms "KL ?*, 7.5" --keys reward_score judge_recall
    python tools/plot.py --centres assets/mini-student runs/diff_instruct_star/pipeline --png centres.png
    python tools/plot.py --strip runs/yoso --png strip.png        the same noises over the training
"""

import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import asked_for, many_step_chunks, read_shapes

from common import UserError, load
from plumbing.cli import Parser, check_flags, check_writable, read_json, read_metrics, run_command
from plumbing.files import writing
from plumbing.grids import PADDING, labelled
from plumbing.shapes import COLOURS

# The label of the axis upwards is turned with its axis, so that there → points up and ← down.
HIGHER, LOWER = " (higher is better →)", " (lower is better ←)"
WORDS = {
    "frechet": "FD" + LOWER, "judge_frechet": "FD-heldout" + LOWER,
    "precision": "precision" + HIGHER, "judge_precision": "precision, held out" + HIGHER,
    "recall": "recall" + HIGHER, "judge_recall": "recall, held out" + HIGHER,
    "right": "share right" + HIGHER, "clean": "share clean" + HIGHER, "sharp": "share sharp" + HIGHER,
    "reward_score": "reward" + HIGHER, "reward": "reward" + HIGHER, "probe": "second reward, logged only",
    "clip_score": "CLIP score", "judge_score": "held-out CLIP score", "calls": "network calls a picture",
    "L_D": "L_D, loss of D (dashed: 2 ln 2)", "L_adv": "L_adv, adversarial loss",
    "L_rec": "L_rec, to the data", "L_con": "L_con, consistency", "images_per_second": "images/s",
}


def plot_rows(folder, patterns, keys, log):
    """A line for each pattern through the means of its arms, ordered by the first key; every seed a dot.

    A single arm is a large dot, for it has no line. log: both axes are logarithmic.
    Returns the figure. Raises UserError if a pattern fits no arm, or a row lacks a key.
    """
    rows = [read_json(file) | dict(file=file) for file in sorted(folder.glob("*.json"))]
    figure = Figure(figsize=(5, 3.6))
    axis = figure.subplots()
    for pattern in patterns:
        arms = {}
        for row in rows:
            if fnmatch(str(row.get("arm")), pattern):
                values = [number(row, key, row["file"]) for key in keys]
                arms.setdefault(row["arm"], []).append(values)
        if not arms:
            raise UserError(f"--arms {pattern}: {folder} has no row of such an arm")
        means = {arm: [sum(column) / len(column) for column in zip(*points)] for arm, points in arms.items()}
        order = sorted(means, key=means.get)
        label = pattern.removesuffix(", ?*").replace("?*", "alpha")
        line, = axis.plot(*zip(*(means[arm] for arm in order)), "-" if len(arms) > 1 else "o", linewidth=1,
                          label=label)
        seeds = [point for points in arms.values() for point in points]
        axis.scatter(*zip(*seeds), s=10, color=line.get_color())
        for arm in order:
            weight = arm.split(",")[0].split()[-1]
            if weight[0].isdigit():
                axis.annotate(weight, means[arm], xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set(xlabel=WORDS.get(keys[0], keys[0]), ylabel=WORDS.get(keys[1], keys[1]))
    if log:
        axis.set(xscale="log", yscale="log")
        for one in (axis.xaxis, axis.yaxis):  # plain numbers instead of powers of ten
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


def number(row, key, source):
    """A row's value of a key. Raises UserError if it has none, or it is no number."""
    if not isinstance(row.get(key), int | float):
        names = [name for name, value in row.items() if isinstance(value, int | float)]
        raise UserError(f"--keys {key}: no number of {source}; it has {', '.join(names)}")
    return row[key]


def plot_runs(runs, keys):
    """A panel for each key, and in it a line for each run. Returns the figure.

    Raises UserError on a key that is in no line of a run.
    """
    figure = Figure(figsize=(3.6 * len(keys), 2.8))
    axes = figure.subplots(1, len(keys), squeeze=False)[0]
    for run in runs:
        rows = read_metrics(run)
        everything = {name: value for row in rows for name, value in row.items()}
        for axis, key in zip(axes, keys):
            number(everything, key, run)
            found = [r for r in rows if key in r]
            axis.plot([r["iteration"] for r in found], [r[key] for r in found], label=run.name, linewidth=0.9)
            axis.set(ylabel=WORDS.get(key, key), xlabel="iteration")
    if "L_D" in keys:
        axes[keys.index("L_D")].axhline(1.3863, color="gray", linewidth=0.7, linestyle="--")
    if len(runs) > 1:
        axes[0].legend(fontsize=7)
    return figure


def plot_centres(pipelines, num):
    """Two panels, each a picture's frame: the centres of the shapes that a pipeline draws in one call.

    Both draw the same captions from the same noises. Returns the figure. Raises UserError if a pipeline is
    not there, or is none that draws shapes.
    """
    figure = Figure(figsize=(5, 2.8))
    for axis, name, pipeline in zip(figure.subplots(1, 2, sharey=True), ("before", "after"), pipelines):
        if not pipeline.is_dir():
            raise UserError(f"--centres {pipeline}: there is no such folder")
        denoiser, codec = load(pipeline)
        if not codec.guided or codec.picture_size > 64:
            raise UserError(f"--centres {pipeline}: it draws no shapes; give a mini model or its student")
        captions, _ = asked_for("shapes", None, codec, num)
        chunks = many_step_chunks(denoiser, codec, captions, steps=1, guidance=1, seed=0)
        shapes = read_shapes(torch.cat([images for images, _ in chunks]))
        x, y = shapes["x"], shapes["y"]
        axis.axhline(0.5, color="lightgray", linewidth=0.7, zorder=0)
        axis.axvline(0.5, color="lightgray", linewidth=0.7, zorder=0)
        axis.scatter(x, y, s=4, color=[list(COLOURS.values())[i] for i in shapes["colour"]])
        mean = torch.hypot(x - 0.5, y - 0.5).mean()
        axis.set_title(f"{name}: mean {mean:.2f} from the middle", fontsize=9)
        axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    return figure


def film_strip(run):
    """The first row of up to eight grids in a run's samples/, the same noises, below one another: a picture.

    The grids are spread geometrically over the training, which changes most at its start; each row's label is
    its iteration. Raises UserError if there are none, or one cannot be read.
    """
    files = sorted(file for file in (run / "samples").glob("*.png") if file.stem.isdigit())
    if not files:
        raise UserError(f"--strip {run}: there are no samples/*.png; give the folder of a run")
    chosen = [files[i - 1] for i in sorted({round(i) for i in np.geomspace(1, len(files), 8)})]
    try:
        grids = [Image.open(file).convert("RGB") for file in chosen]
    except OSError as error:
        raise UserError(f"--strip {run}: a grid cannot be read ({error})")
    width = grids[0].width
    cell = (width - PADDING) // 8  # eight pictures a row, each with the padding on its left
    strip = Image.new("RGB", (width, len(grids) * cell + PADDING), "white")
    for i, grid in enumerate(grids):
        strip.paste(grid.crop((0, 0, width, cell + PADDING)), (0, i * cell))
    return labelled(strip, cell, cell, [f"iteration {int(file.stem)}" for file in chosen], ())


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--keys", nargs="+", help="keys of metrics.jsonl, or two of an ablation's rows "
                        "(default: L_D L_adv L_rec images_per_second)")
    parser.add_argument("--arms", nargs="+",
                        help="of an ablation's folder: a line for each of these patterns of arms")
    parser.add_argument("--log", action="store_true", help="with --arms: logarithmic axes")
    parser.add_argument("--centres", nargs=2, type=Path, metavar=("BEFORE", "AFTER"),
                        help="two pipelines: where their shapes stand in the picture")
    parser.add_argument("--num", type=int, help="with --centres: pictures of each (default: 500)")
    parser.add_argument("--strip", type=Path, metavar="RUN", help="a run: the first row of its samples, over "
                        "the training")
    parser.add_argument("--png", default="curves.png", help="the file to write")
    args = parser.parse_args(argv)
    check_flags(args, num=dict(least=1, most=10**6))
    if sum(map(bool, (args.runs, args.centres, args.strip))) != 1:
        raise UserError("give one of: folders of runs, --centres BEFORE AFTER, --strip RUN")
    for flag, needs in dict(log="--arms", arms="runs", keys="runs", num="--centres").items():
        if getattr(args, flag) and not getattr(args, needs.strip("-")):
            raise UserError(f"--{flag}: only with {needs}")
    if args.arms and (len(args.runs), len(args.keys or ())) != (1, 2):
        raise UserError("--arms: takes one folder of an ablation, and two --keys")
    check_writable(args.png, "--png", ".png")
    if args.strip:
        picture = film_strip(args.strip)
        with writing(args.png):
            picture.save(args.png, "PNG")
        return
    if args.centres:
        figure = plot_centres(args.centres, args.num or 500)
    elif args.arms:
        figure = plot_rows(args.runs[0], args.arms, args.keys, args.log)
    else:
        figure = plot_runs(args.runs, args.keys or ["L_D", "L_adv", "L_rec", "images_per_second"])
    figure.tight_layout()
    with writing(args.png):
        figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    run_command(main)
