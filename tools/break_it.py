"""The mistakes of the docs' "Break it", one at a time: what the pictures become, and whether a test fails.

    python tools/break_it.py yoso                   from scratch, on shapes
    python tools/break_it.py swiftbrush_v2          one student of the mini model
    python tools/break_it.py diff_instruct_star     from assets/mini-student
    python tools/break_it.py yoso --arms "as it is" "no data at level 0" --iterations 500
    python tools/break_it.py yoso --no-train        only the tests
    python tools/break_it.py yoso --table           only the table of the rows that exist

A changed line is put into a copy of the code, OUT/ARM/code, in which the test named for it is run, then the
method; the code as it is measures what was trained. Each arm is a JSON row, even if it stops with an error.
Run the command again to go on where it stopped. OUT/METHOD.png shows the arms on the same noise.
"""

import json
import os
import re
import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from ablate import BUDGET, CLIP, JUDGE, LENGTH, REWARD, run_python
from evaluate import FEWEST, asked_for, evaluate

import yoso
from common import UserError, draw_samples, load
from plumbing.cli import SEED, Parser, check_flags, check_writable, read_json, read_metrics, run_command
from plumbing.files import write_text, writing
from plumbing.grids import save_grid

ROOT = Path(__file__).parent.parent


class Arm(NamedTuple):
    """A row of the docs' table: a text that stands once in the script, and what replaces it; or flags."""
    before: str = ""
    after: str = ""
    test: str = ""  # FILE::TEST of tests/, which fails on the changed line
    flags: str = ""


AS_IT_IS = "as it is"
GRADIENTS = "test_yoso_step.py::test_gradients_go_where_they_belong"
LEVELS = "test_yoso_step.py::test_the_levels_share_data_noise_and_condition"
YOSO = {
    AS_IT_IS: Arm(),
    "the adversary on the data": Arm(flags="--adversary data"),
    "the adversary on noisy pictures": Arm(flags="--adversary ufogen"),
    "a lost stop-gradient at real and target": Arm(
        "run.autocast(), torch.no_grad():", "run.autocast():", GRADIENTS),
    "D's loss reaches G": Arm("p.fake.detach()", "p.fake", GRADIENTS),
    "the printed loss of D": Arm("+ F.softplus(fake_logits)", "- F.softplus(-fake_logits)",
                                 "test_yoso_math.py::test_y3_optimal_discriminator_loss"),
    "a noise of its own for each level": Arm("p.eps, level)", "torch.randn_like(p.eps), level)", LEVELS),
    "each side with its own level": Arm("torch.cat([level, level])", "torch.cat([p.t_real, level])", LEVELS),
    "no data at level 0": Arm(
        "return torch.where((level > 0).view(-1, 1, 1, 1), prediction, p.x0)", "return prediction",
        "test_yoso_math.py::test_a_level_without_noise_is_the_data"),
}
MOVES = "test_swiftbrush_step.py::test_who_moves_whom"
SWIFTBRUSH = {
    AS_IT_IS: Arm(),
    "only one teacher guided": Arm(flags="--no-guide-lora-teacher"),
    "an epsilon student": Arm(flags="--prediction epsilon"),
    "the sign of g": Arm("2 * (eps_teacher - eps_lora_teacher)", "2 * (eps_lora_teacher - eps_teacher)",
                         "test_swiftbrush_math.py::test_s1_s2_the_gradient_descends_the_kl"),
    "a lost stop-gradient in step 2": Arm("no_grad():  # 2.", "enable_grad():  # 2.", MOVES),
    "the LoRA teacher's loss moves the student": Arm("p.f = f.detach()", "p.f = f", MOVES),
    "the printed loss of the LoRA teacher": Arm(
        "(eps_prediction - eps).square().mean()", "(eps_prediction - eps).mean().square()",
        "test_swiftbrush_math.py::test_s4_the_lora_teacher_learns_the_students_score"),
    "student B as it is": Arm(flags="--stage b"),
    "no clamp": Arm(flags="--tau 1 --no-clip-decay --stage b"),
    "the picture detached before CLIP": Arm("loaded.decode(f)", "loaded.decode(f.detach())",
                                            "test_reference_steps.py::test_swiftbrush", "--stage b"),
}
D = "test_diff_instruct_math.py::"
D1 = f"{D}test_d1_the_tractable_loss_has_the_divergences_gradient"
DIFF_INSTRUCT = {
    AS_IT_IS: Arm(),
    "KL for the score divergence": Arm(flags="--divergence kl"),
    "guidance as a reward of its own": Arm(flags="--cfg-choice 1"),
    "too heavy a reward": Arm(flags="--alpha-rew 30"),
    "the printed sign of the guidance": Arm(
        "return alpha_cfg * (", "return -alpha_cfg * (",
        f"{D}test_d7_guidance_as_a_reward_pulls_towards_the_condition", "--cfg-choice 1"),
    "d' as a constant": Arm("e, c, detach_normaliser)", "e, c, detach_normaliser).detach()", D1),
    "the second bracket as a constant": Arm("(assistant - target)).", "(assistant - target).detach()).", D1),
    'the minus "mended"': Arm("return -(weight * u *", "return (weight * u *", D1),
    "a guided assistant": Arm(
        'eps_assistant = assistant.predict(x_t, p.t, "epsilon", p.cond)',
        'eps_assistant = assistant.predict(x_t, p.t, "epsilon", p.cond, p.null, 1.0 + config.alpha_cfg)',
        f"{D}test_the_guided_reference_and_the_plain_assistant"),
}
ARMS = {"yoso": YOSO, "swiftbrush_v2": SWIFTBRUSH, "diff_instruct_star": DIFF_INSTRUCT}
# Of every arm; its own come after them.
FLAGS = {"yoso": LENGTH, "swiftbrush_v2": [*BUDGET, "--stage", "a"],
         "diff_instruct_star": [*LENGTH, "--student", "assets/mini-student"]}
# Half of an ablation's run or less: a mistake shows early, and most show in the first pictures.
ITERATIONS = {"yoso": 1200, "swiftbrush_v2": 120, "diff_instruct_star": 100}
RIGHT = {"right": "all attributes right", "frechet": "FD-clip", "recall": "recall"}
COLUMNS = {
    "yoso": {"clean": "clean", "sharp": "sharp", "recall": "recall", "L_D": "L_D, last half",
             "D_fake": "D(fake) at the end"},
    "swiftbrush_v2": RIGHT | {"clip_score": "CLIP score"},
    "diff_instruct_star": {"reward_score": "reward"} | RIGHT,
}


def folder_of(args, name):
    """The folder of an arm."""
    return args.out / "-".join(re.findall(r"\w+", name.lower()))


def flags_of(args, name):
    """The flags of the script for one arm."""
    words = [*FLAGS[args.method], *ARMS[args.method][name].flags.split(), "--seed", str(args.seed)]
    return [word.format(iterations=args.iterations) for word in words]


def kept_row(args, name):
    """What an earlier call wrote of a row. Raises UserError if it is damaged or of other flags."""
    path = folder_of(args, name) / "row.json"
    row = read_json(path) if path.exists() else {}
    if "flags" in row and (row["flags"], row.get("num")) != (flags_of(args, name), args.num):
        raise UserError(f"{path}: measured with {row['flags']} and {row.get('num')} samples; "
                        "choose another --out")
    return row


def changed(script, arm):
    """The text of a script with the arm's line changed. Raises UserError if it is not there just once."""
    if arm.before and script.count(arm.before) != 1:
        raise UserError(f"--arms: the script has {arm.before!r} {script.count(arm.before)} times, not once")
    return script.replace(arm.before, arm.after) if arm.before else script


def copy_code(code, method, arm):
    """Makes a copy of all code with the arm's line changed, in the folder `code`."""
    shutil.rmtree(code, ignore_errors=True)
    with writing(code):
        for name in ("plumbing", "supplements", "tests", "tools"):
            shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.py"):
            (code / path.name).write_text(path.read_text())
        (code / "assets").symlink_to(ROOT.resolve() / "assets")
        script = code / f"{method}.py"
        script.write_text(changed(script.read_text(), arm))


def check(code, tests):
    """Whether tests fail in a copy of the code."""
    words = ["-m", "pytest", "-q", "-n", "0", "-m", "slow or not slow", *(f"tests/{test}" for test in tests)]
    status, last = run_python(words, code.parent / "test.log", cwd=code)
    if status not in (0, 1):  # 1: a test failed
        raise UserError(f"{code.parent / 'test.log'}: {last}")
    return status == 1


def run_row(args, name):
    """Checks, trains and measures one arm, as far as its row does not say that yet."""
    method, arm, folder = args.method, ARMS[args.method][name], folder_of(args, name)
    row, flags = dict(method=method, arm=name) | kept_row(args, name), flags_of(args, name)
    keep = lambda: write_text(folder / "row.json", json.dumps(row, indent=1, default=str))
    code, run, log = folder / "code" if arm.test else ROOT, folder / "run", folder / "train.log"
    if (arm.test or name == AS_IT_IS) and not {"caught", "flags"} <= row.keys():
        copy_code(folder / "code", method, arm)
        if arm.test and "caught" not in row:
            row["caught"] = "fails, as it should" if check(code, [arm.test]) else "PASSES"
        elif "caught" not in row:  # or a test that always fails would seem to catch something
            tests = sorted({other.test for other in ARMS[method].values() if other.test})
            row["caught"] = "one of these FAILS" if check(folder / "code", tests) else "all of these pass"
        keep()
    if args.no_train or "flags" in row:
        return
    converted = folder_of(args, AS_IT_IS) / "run" / "start"  # which no arm changes: made once
    if (converted / "pipeline").is_dir() and not (run / "start").exists():
        shutil.copytree(converted, run / "start")
    status, last = run_python([code / f"{method}.py", *flags, "--out", run], log)
    if status == 1 or status and "is not finite" in last:  # the mistake's own doing
        row["stops"] = last
    elif status:
        raise UserError(f"{log}: {last or 'nothing said'} (exit status {status})")
    elif method == "yoso":
        metrics = read_metrics(run)
        half = [m["L_D"] for m in metrics if m["iteration"] > args.iterations / 2]
        row |= dict(L_D=sum(half) / len(half), D_fake=metrics[-1]["D_fake"])
        row |= evaluate(run=run, num=args.num, seed=args.seed)
    else:
        pipeline = next(run.glob("[ab]/pipeline"), run / "pipeline")
        row |= evaluate(model=pipeline, steps=1, num=args.num, seed=args.seed, features=CLIP, clip=CLIP,
                        judge=JUDGE, reward=REWARD)
    row |= dict(iterations=args.iterations, flags=flags, num=args.num)
    keep()


def pictures_of(row, seed):
    """(eight one-step pictures of a measured run, their captions), all runs on the same noise."""
    if "run" in row:
        return torch.cat(list(yoso.draw_pictures(yoso.load_sampler(row["run"])[0], [""] * 8, 1, seed))), []
    student, codec = load(row["model"])
    captions, _ = asked_for("shapes", None, codec, 8)
    return draw_samples(student, codec, captions, seed), captions


def draw(rows, path, seed):
    """Writes a picture with a row for each arm, which is grey if the arm stopped."""
    drawn = [None if "stops" in row else pictures_of(row, seed) for row in rows]
    some, captions = next(filter(None, drawn), (torch.zeros(8, 3, 32, 32), []))
    pictures = torch.cat([found[0] if found else torch.zeros_like(some) for found in drawn])
    labels = [row["arm"] + ", stops" * ("stops" in row) for row in rows]
    save_grid(pictures, path, rows=labels, captions=captions)


def table(method, rows):
    """A Markdown table: what the arms' one-step pictures are like, and what the tests say."""
    columns = COLUMNS[method]
    lines = ["| arm | " + " | ".join(columns.values()) + " | caught by |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        cells = [f"{row[key]:.3g}" if key in row else "" if "stops" in row else "not run" for key in columns]
        if "stops" in row:
            cells[0] = "stops: " + textwrap.shorten(row["stops"], 70, placeholder=" ...")
        test = ARMS[method][row["arm"]].test.split("::")[-1]
        cells.append((f"`{test}` " if test else "") + row.get("caught", "a flag"))
        lines.append(" | ".join(["| " + row["arm"], *cells]) + " |")
    return "\n".join(lines)


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="default: all of the method's")
    parser.add_argument("--iterations", type=int, default=0, help="of every arm; default: that of the method")
    parser.add_argument("--num", type=int, default=500, help="samples measured")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the samples")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time, each on its share of the cores")
    parser.add_argument("--out", help="default: runs/break_it/METHOD")
    parser.add_argument("--no-train", action="store_true", help="only the tests")
    parser.add_argument("--table", action="store_true", help="neither tests nor trainings")
    args = parser.parse_args(argv)
    check_flags(args, seed=SEED, iterations=dict(least=0), num=dict(least=FEWEST, most=10**6),
                jobs=dict(least=1), out=dict(needed=True))
    args.iterations = args.iterations or ITERATIONS[args.method]
    args.out = Path(args.out or f"runs/break_it/{args.method}")
    arms = list(dict.fromkeys(args.arms or ARMS[args.method]))
    if unknown := set(arms) - set(ARMS[args.method]):
        raise UserError(f"--arms {unknown.pop()}: unknown; choose of {', '.join(ARMS[args.method])}")
    if args.table and not args.out.is_dir():
        raise UserError(f"--out {args.out}: there is no such folder")
    picture = args.out / f"{args.method}.png"
    if not args.table:
        for name in arms:
            kept_row(args, name)
        check_writable(picture, "--out", deep=True)
        args.out.mkdir(parents=True, exist_ok=True)
        # Or the project's own `python -m pytest` would go through the copies too.
        write_text(args.out / "conftest.py", 'collect_ignore_glob = ["*"]')
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda name: run_row(args, name), arms))
    paths = [folder_of(args, name) / "row.json" for name in ARMS[args.method]]
    rows = [read_json(path) for path in paths if path.exists()]
    finished = [row for row in rows if "flags" in row]
    if finished and not args.table:
        draw(finished, picture, args.seed)
    print(table(args.method, rows))


if __name__ == "__main__":
    run_command(main)
