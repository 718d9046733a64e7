"""The curves of one run, or of several, as a PNG; or an ablation's rows in a plane of two measures.

    python tools/plot.py runs/yoso --png curves.png
    python tools/plot.py runs/ablate/yoso/yoso-seed0 runs/ablate/yoso/ufogen-seed0 --keys L_D L_adv
    python tools/plot.py runs/ablate/diff_instruct_star --arms "KL ?*, 7.5" --keys reward_score judge_recall
"""

import argparse
import json
import sys
from fnmatch import fnmatch
from pathlib import Path

from matplotlib.figure import Figure


def plot_rows(folder, patterns, keys, path, log):
    """A line for each pattern through the means of its arms, ordered by the first key; every seed a dot."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    figure = Figure(figsize=(5, 3.6))
    axis = figure.subplots()
    for pattern in patterns:
        arms = {}
        for row in rows:
            if fnmatch(row["arm"], pattern):
                arms.setdefault(row["arm"], []).append([row[key] for key in keys])
        means = {arm: [sum(column) / len(column) for column in zip(*points)] for arm, points in arms.items()}
        order = sorted(means, key=means.get)
        label = pattern.removesuffix(", ?*").replace("?*", "alpha")
        line, = axis.plot(*zip(*(means[arm] for arm in order)), linewidth=1, label=label)
        seeds = [point for points in arms.values() for point in points]
        axis.scatter(*zip(*seeds), s=10, color=line.get_color())
        for arm in order:
            weight = arm.split(",")[0].split()[-1]
            if weight[0].isdigit():
                axis.annotate(weight, means[arm], xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set(xlabel=keys[0], ylabel=keys[1], yscale="log" if log else "linear")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--keys", nargs="+", default=["L_D", "L_adv", "L_rec", "images_per_second"],
                        help="keys of metrics.jsonl, or two of an ablation's rows")
    parser.add_argument("--arms", nargs="+",
                        help="of an ablation's folder: a line for each of these patterns of arms")
    parser.add_argument("--log", action="store_true", help="with --arms: a logarithmic scale upwards")
    parser.add_argument("--png", default="curves.png", help="the file to write")
    args = parser.parse_args(argv)
    if args.arms:
        return plot_rows(args.runs[0], args.arms, args.keys, args.png, args.log)
    figure = Figure(figsize=(3.6 * len(args.keys), 2.8))
    axes = figure.subplots(1, len(args.keys), squeeze=False)[0]
    for run in args.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for axis, key in zip(axes, args.keys):
            found = [r for r in rows if key in r]
            axis.plot([r["iteration"] for r in found], [r[key] for r in found], label=run.name, linewidth=0.9)
            axis.set(title=key, xlabel="iteration")
    if "L_D" in args.keys:
        axes[args.keys.index("L_D")].axhline(1.3863, color="gray", linewidth=0.7, linestyle="--")
    if len(args.runs) > 1:
        axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
