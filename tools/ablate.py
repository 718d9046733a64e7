"""The papers' ablations in small: each arm and seed is a JSON row; run it again to go on where it stopped.

    python tools/ablate.py yoso --seeds 0 1 2 --jobs 2         YOSO's Table 1, from scratch on shapes
    python tools/ablate.py yoso_t2i --seeds 0 1 2              its fine-tuning, of the adapted mini model
    python tools/ablate.py yoso_pixart --seeds 0               Figures 3 and 7, on pretrain.py's mini-linear
    python tools/ablate.py swiftbrush_v2 --seeds 0 1 2         SwiftBrush v2's Table 5, on the mini model
    python tools/ablate.py diff_instruct_star --seeds 0 1 2    Diff-Instruct*'s Table 2, from SwiftBrush's
    python tools/ablate.py calls --seeds 0                     quality against network calls; trains nothing
    python tools/ablate.py yoso --table                        only the table of the rows that exist

Each arm is the method's script with the flags below and nothing else changed, measured by tools/evaluate.py
on one-step samples. The arms of `calls` are the teacher in few and in many steps, assets/mini-student, and
what diff_instruct_star.py and a fine-tuning by yoso.py left in runs/; what is missing is named and left out.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from evaluate import FEWEST, evaluate

from common import UserError
from plumbing.cli import SEED, Parser, check_flags, check_writable, read_json, read_metrics, run_command
from plumbing.files import write_text, writing

# What an arm changes: its flags, the folder that arms of a seed share (so that merges find their students;
# None: one of its own), and which pipeline below it is measured (None: the run itself). An arm without flags
# trains nothing; in the pipeline's place it has evaluate's arguments for a model that exists.
LENGTH = ["--iterations", "{iterations}"]
YOSO = {
    "yoso": (LENGTH, None, None),
    "no consistency": ([*LENGTH, "--lambda-con", "0"], None, None),
    "LPIPS": ([*LENGTH, "--rec-distance", "lpips", "--con-distance", "lpips"], None, None),
    "D_adv(p_d || p_t)": ([*LENGTH, "--adversary", "data"], None, None),
    "UFOGen": ([*LENGTH, "--adversary", "ufogen"], None, None),
}
MODEL, CLIP, JUDGE, TEACHER_GUIDANCE = "assets/mini-sd", "assets/mini-clip", "assets/mini-judge", 2.0
REWARD = "assets/mini-pickscore"


def teacher(steps):
    """The arm that measures the teacher with so many steps."""
    return None, None, dict(model=MODEL, steps=steps, guidance=TEACHER_GUIDANCE)


# All arms of a seed go on from one adapted model, which the first makes; D is made from the original.
FINE_TUNE = ["--model", "{out}/adapted-alone-seed{seed}/adapt-2/pipeline", "--preset", "mini",
             "--discriminator", MODEL, *LENGTH]
YOSO_T2I = {
    "adapted alone": (["--model", MODEL, "--adapt", "--iterations", "1"], None, "adapt-2/pipeline"),
    "yoso": (FINE_TUNE, None, "pipeline"),
    "no consistency": ([*FINE_TUNE, "--lambda-con", "0"], None, "pipeline"),
    "no latent perceptual": ([*FINE_TUNE, "--con-distance", "l2"], None, "pipeline"),
    "D_adv(p_d || p_t)": ([*FINE_TUNE, "--adversary", "data"], None, "pipeline"),
}
LINEAR = ["--model", "runs/mini-linear", "--preset", "mini", "--discriminator", MODEL]
WAYS = {"epsilon": [], "adapted": ["--adapt"], "direct switch": ["--adapt", "--adapt-iterations", "0"]}
# Each way is one run that goes on from count to count.
YOSO_PIXART = {
    f"{way}, {n}": ([*LINEAR, *flags, "--iterations", str(n)], way.replace(" ", "-"), "pipeline")
    for way, flags in WAYS.items() for n in (100, 200, 400, 800)}
BUDGET = [*LENGTH, "--iterations-b", "{iterations}"]
MERGE = [*BUDGET, "--stage", "merge", "--merge-lambda"]
SWIFTBRUSH = {
    "teacher, 25 steps": teacher(25),
    "v1: epsilon student": ([*BUDGET, "--stage", "a", "--prediction", "epsilon"], "v1", "a/pipeline"),
    "A": ([*BUDGET, "--stage", "a"], "shared", "a/pipeline"),
    "B without CLIP": ([*BUDGET, "--stage", "b", "--clip-weight", "0"], "b-without", "b/pipeline"),
    "B, naive CLIP": ([*BUDGET, "--stage", "b", "--tau", "1", "--no-clip-decay"], "b-naive", "b/pipeline"),
    "B, clamped": ([*BUDGET, "--stage", "b", "--no-clip-decay"], "b-clamped", "b/pipeline"),
    "B, clamped and scheduled": ([*BUDGET, "--stage", "b"], "shared", "b/pipeline"),
    **{f"merged, lambda {x}": ([*MERGE, x], "shared", "pipeline") for x in ("0.25", "0.5", "0.75")},
    "A from a one-step model": ([*BUDGET, "--stage", "a", "--student", "{out}/shared-seed{seed}/pipeline"],
                                "continued", "a/pipeline"),
    "merged, lambda 0.5, regularised": ([*BUDGET, "--regularise", "pairs"], "regularised", "pipeline"),
}
STUDENT = "runs/swiftbrush_v2/pipeline"


def diff_instruct_arm(divergence, alpha_rew, alpha_cfg, *more):
    """A row of Table 2: its settings; alpha_rew is the mini model's, a tenth of the paper's."""
    weights = ["--alpha-rew", alpha_rew, "--alpha-cfg", alpha_cfg]
    flags = [*LENGTH, "--student", STUDENT, "--divergence", divergence, *weights, *more]
    return flags, None, "pipeline"


DIFF_INSTRUCT = {
    "init": (None, None, dict(model=STUDENT, steps=1)),
    "KL 0, 0": diff_instruct_arm("kl", "0", "0"),
    **{f"KL {a}, 7.5": diff_instruct_arm("kl", a, "7.5") for a in ("0", "1", "3", "10", "30", "100")},
    "choice 1 10, 7.5": diff_instruct_arm("score", "10", "7.5", "--cfg-choice", "1"),
    "score 0, 0": diff_instruct_arm("score", "0", "0"),
    **{f"score {a}, 7.5": diff_instruct_arm("score", a, "7.5") for a in ("0", "0.1", "1", "3", "10", "30")},
    **{f"x0 {a}, 7.5": diff_instruct_arm("score", a, "7.5", "--weighting", "x0")
       for a in ("0", "1", "3", "10", "30")},
    "score 10, 4.5": diff_instruct_arm("score", "10", "4.5"),
    "score 10, 7.5, longer": diff_instruct_arm("score", "10", "7.5", "--iterations", "{longer}"),
}
CALLS = {
    **{f"teacher, {n} step{'s' * (n > 1)}": teacher(n) for n in (1, 2, 4, 8, 16, 25)},
    "SwiftBrush v2, 1 call": (None, None, dict(model="assets/mini-student", steps=1)),
    "Diff-Instruct*, 1 call": (None, None, dict(model="runs/diff_instruct_star/pipeline", steps=1)),
    **{f"YOSO, {n} call{'s' * (n > 1)}": (None, None, dict(model="runs/yoso_t2i/pipeline", nfe=n))
       for n in (1, 2, 4)},
}
ARMS = {"yoso": YOSO, "yoso_t2i": YOSO_T2I, "yoso_pixart": YOSO_PIXART, "swiftbrush_v2": SWIFTBRUSH,
        "diff_instruct_star": DIFF_INSTRUCT, "calls": CALLS}
# Of every run; the arms of yoso_pixart have their own, those of calls none.
ITERATIONS = {"yoso": 2500, "yoso_t2i": 600, "yoso_pixart": 800, "swiftbrush_v2": 400,
              "diff_instruct_star": 200, "calls": 0}
DISTANCE = {"frechet": "FD-clip", "precision": "precision", "recall": "recall"}
JUDGED = {"judge_frechet": "FD-heldout", "judge_precision": "precision, held out",
          "judge_recall": "recall, held out"}
RIGHT, MINUTES = {"right": "all attributes right"}, {"minutes": "minutes"}
COLUMNS = {
    "yoso": {"frechet": "FD-conv", "modes": "modes of 36", "clean": "clean", "sharp": "sharp",
             "precision": "precision", "recall": "recall", "L_D": "L_D, last half"} | MINUTES,
    "yoso_t2i": DISTANCE | JUDGED | RIGHT | MINUTES,
    "yoso_pixart": {"frechet": "FD-clip"} | JUDGED | RIGHT | {"background_error": "background's error"},
    "swiftbrush_v2": (DISTANCE | {"clip_score": "CLIP score"} | JUDGED
                      | {"judge_score": "held-out CLIP score"} | RIGHT | MINUTES),
    "diff_instruct_star": {"reward_score": "reward", "judge_score": "held-out CLIP score",
                           "clip_score": "CLIP score"} | JUDGED | RIGHT | MINUTES,
    "calls": {"calls": "network calls", "frechet": "FD-clip"} | JUDGED | RIGHT,
}


def name_of(arm, seed):
    """The name of a row's files."""
    words = re.sub("[,:*]", "", arm.split("(")[0].lower()).split()
    return f"{'-'.join(words)}-seed{seed}"


def flags_of(method, arm, seed, iterations, out):
    """The flags of the script for one arm with one seed."""
    values = dict(iterations=iterations, longer=3 * iterations, out=out, seed=seed)
    return [*(argument.format(**values) for argument in ARMS[method][arm][0] or ()), "--seed", str(seed)]


def kept_row(method, arm, seed, iterations, out, num):
    """The row that an earlier call wrote, or None. Raises UserError if it is damaged or of other flags."""
    path, flags = out / f"{name_of(arm, seed)}.json", flags_of(method, arm, seed, iterations, out)
    row = read_json(path) if path.exists() else None
    if row and (row.get("flags"), row.get("num")) != (flags, num):
        raise UserError(f"{path}: measured with {row.get('flags')} and {row.get('num')} samples; "
                        "choose another --out")
    return row


def run_row(method, arm, seed, iterations, out, num):
    """Trains and measures one arm with one seed, unless its row exists; returns the row."""
    if row := kept_row(method, arm, seed, iterations, out, num):
        return row
    name, flags = name_of(arm, seed), flags_of(method, arm, seed, iterations, out)
    arguments, folder, pipeline = ARMS[method][arm]
    row = dict(method=method, arm=arm, seed=seed, iterations=iterations, flags=flags)
    if "--iterations" in flags:
        row["iterations"] = int(flags[-flags[::-1].index("--iterations")])
    run = out / (f"{folder}-seed{seed}" if folder else name)
    try:
        if arguments is not None:
            train(method, flags, run, out / f"{name}.log")
            row["minutes"] = round(sum(minutes_of(log.parent) for log in logs_of(run, pipeline)), 2)
        if method == "yoso":
            half = [m["L_D"] for m in read_metrics(run) if m["iteration"] > iterations / 2]
            row |= dict(L_D=sum(half) / len(half), **evaluate(run=run, num=num, seed=seed))
        else:
            calls = dict(nfe=1) if method.startswith("yoso_") else dict(steps=1)
            measured = pipeline if arguments is None else dict(model=run / pipeline, **calls)
            row |= evaluate(**measured, num=num, seed=seed, features=CLIP, clip=CLIP, judge=JUDGE,
                            reward=REWARD)
            row["calls"] = row["steps"] * (1 if row.get("guidance", 1) == 1 else 2)  # guidance asks twice
        write_text(out / f"{name}.json", json.dumps(row, indent=1, default=str))
    except (UserError, KeyError, ZeroDivisionError) as error:  # the other arms go on
        reason = error if isinstance(error, UserError) else f"{run}: damaged, it lacks {error}"
        print(f"{name}: not run: {reason}", file=sys.stderr)
        return row | dict(failed=str(reason))
    return row


def run_python(words, log, **options):
    """`python WORDS` with its output added to the log -> the exit code, and its last line, bars aside."""
    with writing(log):
        log.parent.mkdir(exist_ok=True)
        file = open(log, "a")
    start = file.tell()  # behind what an earlier call wrote
    with file:
        code = subprocess.run([sys.executable, *words], stdout=file, stderr=file, **options).returncode
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return code, next((line for line in reversed(lines) if line.strip() and "%|" not in line), "")


def train(method, flags, run, log):
    """Runs the method's script, which writes to the log; if it fails, UserError has its last line."""
    script = Path(__file__).parent.parent / f"{'yoso' if method.startswith('yoso') else method}.py"
    code, last = run_python([script, *flags, "--out", run], log)
    if code < 0:
        raise UserError(f"{log}: ended by signal {-code}")
    if code:
        raise UserError(last)


def logs_of(run, pipeline):
    """The metrics of what was trained for a pipeline: of a run with all below it, or of one stage."""
    stage = Path(pipeline or "").parts[:1]
    if not pipeline or stage == ("pipeline",):
        return list(run.rglob("metrics.jsonl"))
    return [log for log in run.rglob("metrics.jsonl") if log.parent.name in (stage[0], "start", "adapt-1")]


def minutes_of(run):
    """How long a run trained, by its images/s."""
    metrics, batch = read_metrics(run), read_json(run / "config.json")["batch_size"]
    gaps = zip([0, *(m["iteration"] for m in metrics)], metrics)
    return sum((m["iteration"] - before) * batch / m["images_per_second"] for before, m in gaps) / 60


def table(method, rows):
    """A Markdown table: mean and standard deviation over the seeds of each arm."""
    columns = COLUMNS[method]
    lines = ["| arm | seeds | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm in ARMS[method]:
        mine = [r for r in rows if r.get("arm") == arm]
        cells = []
        for key in columns:
            values = torch.tensor([float(r[key]) for r in mine if key in r])
            spread = f" ± {values.std():.2g}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3g}{spread}" if len(values) else "none" if mine else "not run")
        lines.append("| " + arm.replace("|", "\\|") + f" | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="default: all of the method's")
    parser.add_argument("--iterations", type=int, default=0,
                        help="of every run, an equal budget; default: that of the method")
    parser.add_argument("--num", type=int, default=2000, help="samples measured")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each on its share of the cores")
    parser.add_argument("--out", help="default: runs/ablate/METHOD")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    check_flags(args, seeds=SEED, iterations=dict(least=0), num=dict(least=FEWEST, most=10**6),
                jobs=dict(least=1), out=dict(needed=True))
    arms = args.arms or list(ARMS[args.method])
    out = Path(args.out or f"runs/ablate/{args.method}")
    unknown = set(arms) - set(ARMS[args.method])
    if unknown:
        raise UserError(f"--arms {unknown.pop()}: unknown; choose of {', '.join(ARMS[args.method])}")
    iterations, failed = args.iterations or ITERATIONS[args.method], []
    if args.table and not out.is_dir():
        raise UserError(f"--out {out}: there is no such folder")
    if not args.table:
        seeds = list(dict.fromkeys(args.seeds))  # two runs cannot share a folder
        for seed, arm in product(seeds, arms):
            kept_row(args.method, arm, seed, iterations, out, args.num)
        check_writable(out / f"{args.method}.log", "--out", deep=True)
        out.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        with ThreadPoolExecutor(args.jobs) as pool:
            # The arms of a seed run in their order: a merge needs its students.
            rows = pool.map(lambda seed: [run_row(args.method, arm, seed, iterations, out, args.num)
                                          for arm in arms], seeds)
            failed = [name_of(row["arm"], row["seed"]) for row in chain(*rows) if "failed" in row]
    print(table(args.method, [read_json(path) for path in sorted(out.glob("*.json"))]))
    if failed:
        print(f"ablate.py: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
