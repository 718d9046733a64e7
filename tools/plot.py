"""The curves of one run, or of several, as a PNG; or an ablation's rows in a plane of two measures.

    python tools/plot.py runs/yoso --png curves.png
    python tools/plot.py runs/ablate/yoso/yoso-seed0 runs/ablate/yoso/ufogen-seed0 --keys L_D L_adv
    python tools/plot.py runs/ablate/diff_instruct_star --arms "KL ?*, 7.5" --keys reward_score judge_recall
"""

import sys
from fnmatch import fnmatch
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError
from plumbing.cli import Parser, check_writable, read_json, read_metrics, run_command
from plumbing.files import writing


def plot_rows(folder, patterns, keys, log):
    """A line for each pattern through the means of its arms, ordered by the first key; every seed a dot.

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
        line, = axis.plot(*zip(*(means[arm] for arm in order)), linewidth=1, label=label)
        seeds = [point for points in arms.values() for point in points]
        axis.scatter(*zip(*seeds), s=10, color=line.get_color())
        for arm in order:
            weight = arm.split(",")[0].split()[-1]
            if weight[0].isdigit():
                axis.annotate(weight, means[arm], xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set(xlabel=keys[0], ylabel=keys[1], yscale="log" if log else "linear")
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
            axis.set(title=key, xlabel="iteration")
    if "L_D" in keys:
        axes[keys.index("L_D")].axhline(1.3863, color="gray", linewidth=0.7, linestyle="--")
    if len(runs) > 1:
        axes[0].legend(fontsize=7)
    return figure


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--keys", nargs="+", default=["L_D", "L_adv", "L_rec", "images_per_second"],
                        help="keys of metrics.jsonl, or two of an ablation's rows")
    parser.add_argument("--arms", nargs="+",
                        help="of an ablation's folder: a line for each of these patterns of arms")
    parser.add_argument("--log", action="store_true", help="with --arms: a logarithmic scale upwards")
    parser.add_argument("--png", default="curves.png", help="the file to write")
    args = parser.parse_args(argv)
    if args.arms and (len(args.runs), len(args.keys)) != (1, 2):
        raise UserError("--arms: takes one folder of an ablation, and two --keys")
    if args.log and not args.arms:
        raise UserError("--log: only with --arms")
    check_writable(args.png, "--png", ".png")
    if args.arms:
        figure = plot_rows(args.runs[0], args.arms, args.keys, args.log)
    else:
        figure = plot_runs(args.runs, args.keys)
    figure.tight_layout()
    with writing(args.png):
        figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    run_command(main)
