"""The paper's ablations in small: every arm and seed as one run and one JSON row; run it again to go on where it stopped.

    python tools/ablate.py --seeds 0 1 2 --iterations 3000 --jobs 2          Table 1 of YOSO on shapes
    python tools/ablate.py --table                                           only print the table of the rows that exist

Each arm is `python yoso.py` with the flags below and nothing else changed, measured by tools/evaluate.py on one-step samples.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import torch

from common import UserError, run_command
from evaluate import evaluate

ARMS = {
    "yoso": [],
    "no consistency": ["--lambda-con", "0"],
    "LPIPS": ["--distance", "lpips"],
    "D_adv(p_d || p_t)": ["--adversary", "data"],
    "UFOGen": ["--adversary", "ufogen"],
}
COLUMNS = {"frechet": "Fréchet distance", "modes": "modes of 36", "clean": "clean", "sharp": "sharp", "precision": "precision",
           "recall": "recall",
           "L_D": "L_D, last half", "minutes": "minutes"}


def run_row(arm, seed, iterations, out, num):
    """Trains and measures one arm with one seed, unless its row exists; returns the row."""
    name = f"{arm.split('(')[0].strip().lower().replace(' ', '-')}-seed{seed}"
    path = out / f"{name}.json"
    flags = [*ARMS[arm], "--seed", str(seed), "--iterations", str(iterations)]
    if path.exists():
        row = json.loads(path.read_text())
        if (row["flags"], row["num"]) != (flags, num):
            raise UserError(f"{path}: measured with {' '.join(row['flags'])} and {row['num']} samples; choose another --out")
        return row
    script = Path(__file__).parent.parent / "yoso.py"
    with open(out / f"{name}.log", "a") as log:
        code = subprocess.run([sys.executable, script, *flags, "--out", out / name], stdout=log, stderr=log).returncode
    row = dict(arm=arm, seed=seed, iterations=iterations, flags=flags)
    if code:
        reason = (out / f"{name}.log").read_text().strip().splitlines()[-1]
        print(f"{name}: not run: {reason}", file=sys.stderr)
        return row | dict(failed=reason)
    metrics = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    half = [m["L_D"] for m in metrics if m["iteration"] > iterations / 2]
    batch = json.loads((out / name / "config.json").read_text())["batch_size"]
    gaps = zip([0, *(m["iteration"] for m in metrics)], metrics)
    seconds = sum((m["iteration"] - before) * batch / m["images_per_second"] for before, m in gaps)
    row |= dict(minutes=round(seconds / 60, 2), L_D=sum(half) / len(half), **evaluate(run=out / name, num=num, seed=seed))
    path.write_text(json.dumps(row, indent=1, default=str) + "\n")
    return row


def table(rows):
    """A Markdown table: mean and standard deviation over the seeds of each arm."""
    lines = ["| arm | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for arm in ARMS:
        mine = [r for r in rows if r["arm"] == arm and "failed" not in r]
        cells = []
        for key in COLUMNS:
            values = torch.tensor([float(r[key]) for r in mine])
            spread = f" ± {values.std():.2g}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3g}{spread}" if len(values) else "not run")
        lines.append("| " + arm.replace("|", "\\|") + f" | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--iterations", type=int, default=3000, help="of every run: an equal budget")
    parser.add_argument("--num", type=int, default=2000, help="samples measured")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the CPU cores")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
        torch.set_num_threads(1)
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
            list(pool.map(lambda job: run_row(*job, args.iterations, args.out, args.num), jobs))
    print(table([json.loads(p.read_text()) for p in sorted(args.out.glob("*.json"))]))


if __name__ == "__main__":
    run_command(main)
