"""The curves of one run, or of several for comparison, as a PNG.

    python tools/plot.py runs/yoso --png curves.png
    python tools/plot.py runs/ablate/yoso-seed0 runs/ablate/ufogen-seed0 --keys L_D L_adv --png compare.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--keys", nargs="+", default=["L_D", "L_adv", "L_rec", "images_per_second"], help="keys of metrics.jsonl")
    parser.add_argument("--png", default="curves.png", help="the file to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(args.keys), figsize=(3.6 * len(args.keys), 2.8), squeeze=False)
    for run in args.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for axis, key in zip(axes[0], args.keys):
            found = [r for r in rows if key in r]
            axis.plot([r["iteration"] for r in found], [r[key] for r in found], label=run.name, linewidth=0.9)
            axis.set(title=key, xlabel="iteration")
    if "L_D" in args.keys:
        axes[0][args.keys.index("L_D")].axhline(1.3863, color="gray", linewidth=0.7, linestyle="--")
    if len(args.runs) > 1:
        axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.png, dpi=110)


if __name__ == "__main__":
    main()
