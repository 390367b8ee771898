"""Show the paper's claims again at small scale (arXiv 2601.16208): one row, one command each.

    python reproduce.py --list
    python reproduce.py width              # run what is missing, then write results/width.*
    python reproduce.py width --quick      # a smoke test of a minute, in runs/reproduce-quick
    python reproduce.py width --plot       # only draw results/width.png and .md again

A row holds its claim, the paper's numbers, the arms (commands that differ in one thing), the seeds,
what to measure, and the rule that turns the numbers into a verdict. The rule is written before the
run. Seeds are paired: arms with the same seed see the same data, noise and initial draws.
"""
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import cli
from cli import UserError

ROOT = Path(__file__).parent
YES, PARTLY, NO = "reproduced", "partly", "not at this scale"
# What --quick adds to each command. argparse keeps the last value of a flag.
TRAIN = "--steps 4 --batch 4 --log-every 1 --sample-every 0 --save-every 4"
QUICK = {"train_dit.py": f"{TRAIN} --sample-steps 1", "train_decoder.py": TRAIN,
         "tiny/train_encoder.py": TRAIN, "decoder": "--count 4", "judge": "--count 2",
         "t2i": "--per-category 2 --n 1 --steps 1", "vqa": "--count 8 --max-tokens 4",
         "candidates": "--per-category 2 --n 4 --steps 1", "flow": "--count 4 --times 0.5",
         "fid": "--count 4 --steps 1"}


@dataclass(frozen=True)
class Row:
    name: str
    claim: str
    paper: str              # place and numbers in the paper
    arms: dict              # {label: [command, ...]}; {row}, {run}, {seed} are filled in
    seeds: tuple
    measure: Callable       # outputs of an arm's commands -> {metric: number, or [[x, y], ...]}
    rule: Callable          # {arm: {metric: [value of each seed]}} -> (verdict, our numbers)
    prepare: Callable = None        # writes the row's own data into a folder
    quick: tuple = ()       # (long, short): replacements in the commands for --quick
    x: str = ""             # what x is in a metric of pairs
    note: str = ""          # what the reader should know: choices, causes that were measured


def dit(flags, steps, out="{run}", seed="{seed}"):
    """Return a training command of stage 2."""
    return (f"train_dit.py {flags} --steps {steps} --seed {seed} --sample-every 0 --save-every 300 "
            f"--keep 1 --workers 1 --out {out}").replace("  ", " ")


def mean(values):
    return statistics.fmean(values)


def last(log, key, count=1):
    """Return the mean of the last `count` logged values of a key."""
    return mean([line[key] for line in log if line.get(key) is not None][-count:])


# ------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------

def one_image(folder):
    from tiny import world
    write_images(folder / "one", [world.scene("builtin:synthetic", 0, 0)], world.caption)


def write_images(folder, scenes, caption):
    """Write scenes as an image folder with a metadata.jsonl."""
    from PIL import Image
    from tiny import world
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k, scene in enumerate(scenes):
        Image.fromarray(world.render(scene, 64)).save(folder / f"{k:05d}.png")
        lines.append(json.dumps({"file_name": f"{k:05d}.png", "text": caption(scene)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def width_rule(m):
    """Reproduced: with v the loss at D 64 stays above 0.9 times its floor 1 - 64/96 = 0.33, and
    both v at D 160 and x at D 64 end below half of the floor. Partly: only one of these two does.
    """
    narrow, wide, clean = (mean(m[arm]["flow loss"]) for arm in ("v, D 64", "v, D 160", "x, D 64"))
    below = (wide < 1 / 6) + (clean < 1 / 6)
    verdict = NO if narrow < 0.3 or not below else YES if below == 2 else PARTLY
    return verdict, f"loss {narrow:.2f} (v, D 64), {wide:.2f} (v, D 160), {clean:.2f} (x, D 64)"


def colours(outputs):
    out = outputs[0]
    return {"background right, %": out["background"], "colour right, %": out["colour"],
            "condition spread": last(out["log"], "cond_spread")}


def shift_rule(m):
    """Reproduced: auto gives at least 95 % of the backgrounds and 90 % of the colours, and none
    gives at most 30 % of the backgrounds. Partly: auto beats none and base 4096 in backgrounds by
    20 points or more.
    """
    back = {arm: mean(v["background right, %"]) for arm, v in m.items()}
    colour = mean(m["auto (6.93)"]["colour right, %"])
    gain = back["auto (6.93)"] - max(back["none (1)"], back["base 4096 (1.22)"])
    verdict = (YES if back["auto (6.93)"] >= 95 and colour >= 90 and back["none (1)"] <= 30 else
               PARTLY if gain >= 20 else NO)
    return verdict, "backgrounds right: " + ", ".join(f"{k} {v:.0f} %" for k, v in back.items())


def picks(outputs):
    rows = outputs[0]["rows"]
    lines = {}
    for row in rows:
        for kind in ("right", "gain", "low"):
            name = f"keep {row['keep']}: {kind}"
            lines.setdefault(name, {}).setdefault(row["verifier"], []).append([row["n"], row[kind]])
    return lines


def of_verifier(name):
    return lambda outputs: {k: v[name] for k, v in picks(outputs).items()}


def best_rule(m):
    """For each of the authors' verifiers (prompt, yes) with keep 1: the share of right picks never
    falls by more than 0.01 from N to 2N, and at N = 32 the interval of the gain over a random pick
    lies above 0. Reproduced: both verifiers do this. Partly: the mean gain at N = 32 is above 0.
    """
    gain = {v: m[v]["keep 1: gain"][0][-1][1] for v in ("prompt", "yes")}
    low = {v: m[v]["keep 1: low"][0][-1][1] for v in gain}
    right = {v: [y for _, y in m[v]["keep 1: right"][0]] for v in gain}
    rises = {v: all(b > a - 0.01 for a, b in zip(y, y[1:])) for v, y in right.items()}
    good = [v for v in gain if low[v] > 0 and rises[v]]
    verdict = YES if len(good) == 2 else PARTLY if min(gain.values()) > 0 else NO
    return verdict, ", ".join(f"{v}: {y[0]:.3f} to {y[-1]:.3f} at 1 of 32" for v, y in
                              right.items())


def unseen_loss(outputs):
    return {"flow loss, unseen images": outputs[-1]["flow"]}


def sizes_rule(m):
    """Reproduced: the mean loss falls with each larger width. Partly: only the largest width is
    better than the smallest.
    """
    loss = [mean(v["flow loss, unseen images"]) for v in m.values()]
    falls = all(b < a for a, b in zip(loss, loss[1:]))
    verdict = YES if falls else PARTLY if loss[-1] < loss[0] else NO
    return verdict, "flow loss " + ", ".join(f"{x:.4f}" for x in loss) + f" ({', '.join(m)})"


def head_rule(m):
    """The gain is the loss of the arm with equally many parameters in depth minus that of the arm
    with the head, by seed. Reproduced: the gain at D 112 is above 0 for every seed and its mean is
    larger than at D 224. Partly: only the means say so.
    """
    gains = {}
    for D in (112, 224):
        arms = (m[f"D {D}, depth"], m[f"D {D}, head"])
        deep, head = (arm["flow loss, unseen images"] for arm in arms)
        gains[D] = [a - b for a, b in zip(deep, head)]
    larger = mean(gains[112]) > max(0, mean(gains[224]))
    verdict = NO if not larger else YES if min(gains[112]) > 0 else PARTLY
    return verdict, (f"gain in flow loss {mean(gains[112]):+.4f} at D 112, "
                     f"{mean(gains[224]):+.4f} at D 224")


FLOW = "evaluate.py flow --run {run} --count 1024"
NARROW = "--data {row}/one --batch 8 --lr 3e-3 --sample-steps 1 --depth 4 --log-every 10"

ROWS = [
    Row("width", "The DiT must be wider than the latent's channels C, because noise fills all of "
        "them; predicting x instead of v lifts this bound",
        "App. B: a DiT narrower than C cannot overfit one image; RAE (arXiv 2510.11690): the loss "
        "has the floor 1 - D/C",
        {"v, D 64": [dit(f"{NARROW} --width 64 --heads 2 --allow-narrow", 300)],
         "v, D 96": [dit(f"{NARROW} --width 96 --heads 3 --allow-narrow", 300)],
         "v, D 160": [dit(f"{NARROW} --width 160 --heads 5", 300)],
         "x, D 64": [dit(f"{NARROW} --width 64 --heads 2 --allow-narrow --predict x", 300)]},
        (0, 1, 2), lambda outputs: {"flow loss": last(outputs[0]["log"], "flow", 5)}, width_rule,
        prepare=one_image, note="C = 96. One image, 8 fresh noises a step; the loss is the mean of "
        "the last 50 steps."),
    Row("shift", "The time shift must grow with the dimension of the latent",
        "Section 3.2: GenEval 23.6 without the shift, 49.6 with it",
        {"none (1)": [dit("--shift none", 900)],
         "base 4096 (1.22)": [dit("--shift-base 4096", 900)],
         "3": [dit("--shift 3", 900)],
         "auto (6.93)": [dit("--shift auto", 900)]},
        (0, 1, 2), colours, shift_rule, note="Single shapes that training has not seen, 128 images "
        "a seed. The base 128 behind `auto` was chosen on this world; the shipped model's last "
        "three million images were trained with shift 3."),
    Row("best-of-n", "The model ranks its own latents: the best of N beats one draw, and more "
        "candidates help",
        "Table 5: GenEval 53.2 to 60.0 with the best 4 of 32",
        {v: ["evaluate.py candidates --n 32 --per-category 8 --seed {seed}"]
         for v in ("prompt", "yes", "yes-prob", "loss")},
        (0,), None, best_rule, x="N", note="The shipped model and the benchmark's prompts about "
        "shapes. `prompt` and `yes` are the authors' verifiers, `yes-prob` and `loss` are ours. "
        "The interval is over prompts."),
    Row("sizes", "A larger DiT is better after equally many images",
        "Fig. 5: GenEval and DPG-Bench rise from 0.5B to 9.8B",
        {f"D {D}": [dit(f"--width {D} --heads {H}", 600), FLOW]
         for D, H in ((112, 4), (128, 4), (160, 5), (224, 8))},
        (0, 1), unseen_loss, sizes_rule, note="Flow loss on 1,024 unseen images at t = 0.1 to 0.9 "
        "with fixed noise, averaged weights. The benchmark's score is near its floor after so few "
        "images."),
    Row("wide-head", "A wide head (DiT-DH) helps a small DiT, and less with width",
        "Fig. 4b: GenEval +11.2 at 0.5B, about 0 from 2.4B",
        {f"D {D}, {name}": [dit(f"--width {D} --heads {D // 28} {flags}", 900),
                            FLOW]
         for D, depth in ((112, 17), (224, 9))
         for name, flags in (("plain", ""), ("head", "--head-width 256 --head-depth 2"),
                             ("depth", f"--depth {depth}"))},
        (0, 1, 2), unseen_loss, head_rule, note="The head has two blocks of width 256. `depth` has "
        "about as many parameters as `head`, in more blocks of width D."),
]


# ------------------------------------------------------------------------------------------------
# Run
# ------------------------------------------------------------------------------------------------

def commands(row, arm, seed, folder, quick):
    """Return the commands of one arm and seed."""
    name = re.sub(r"[^a-z0-9.]+", "-", arm.lower()).strip("-")
    found = []
    for command in row.arms[arm]:
        if quick:
            for long, short in row.quick:
                command = command.replace(long, short)
            script, task, *_ = command.split()
            command += " " + QUICK[task if script == "evaluate.py" else script]
        found.append(command.format(row=folder, run=folder / f"{name}-{seed}", seed=seed))
    return found


def run(command):
    """Run a command -> {seconds, ...}: a training's log, or the last line of an evaluation."""
    print(f"\npython {command}", flush=True)
    script, *words = command.split()
    start, line = time.time(), ""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words], text=True,
                               stdout=subprocess.PIPE)
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait():
        raise UserError(f"python {command} ended with status {process.returncode}; mend the cause "
                        "and run the same reproduce.py command to go on")
    seconds = time.time() - start
    if script == "evaluate.py":
        return {"seconds": seconds, **json.loads(line)}
    path = Path(words[words.index("--out") + 1]) / "log.jsonl"
    log = [json.loads(text) for text in path.read_text().splitlines()]
    steps = [0] + [entry["step"] for entry in log]
    seconds = sum((b - a) * entry["step_s"] for a, b, entry in zip(steps, steps[1:], log))
    shares = re.search(r"background right ([\d.]+)%, object colour right ([\d.]+)%", line)
    found = dict(zip(("background", "colour"), map(float, shares.groups()))) if shares else {}
    return {"seconds": seconds, "log": log, **found}


def reproduce(row, quick):
    """Run what is missing of a row and write its results. Finished commands are kept in done.json;
    an interrupted training resumes from its checkpoint."""
    folder = Path("runs/reproduce-quick" if quick else "runs/reproduce", row.name)
    if quick:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if row.prepare:
        row.prepare(folder)
    path = folder / "done.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    points = []
    used = {}
    for seed in row.seeds[:1] if quick else row.seeds:
        for arm in row.arms:
            outputs = []
            for command in commands(row, arm, seed, folder, quick):
                if command not in done:
                    done[command] = {**run(command), "commit": commit()}
                    path.write_text(json.dumps(done))
                outputs.append(done[command])
                used[command] = done[command]
            measure = row.measure or of_verifier(arm)
            points.append({"arm": arm, "seed": seed, "values": measure(outputs)})
    write(row, {
        "name": row.name, "claim": row.claim, "paper": row.paper, "points": points,
        "commands": {arm: [f"python {c}" for c in commands(row, arm, "SEED", folder, quick)]
                     for arm in row.arms},
        "hours": round(sum(out["seconds"] for out in used.values()) / 3600, 2),
        "machine": machine(), "commits": sorted({out["commit"] for out in used.values()}),
        "date": time.strftime("%Y-%m-%d")}, folder / "results" if quick else ROOT / "results")


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                          capture_output=True)
    return done.stdout.strip() or "unknown"


def machine():
    import torch
    names = []
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (f"{gpu}{names[0] if names else platform.machine()}, {os.cpu_count()} cores, "
            f"torch {torch.__version__}")


# ------------------------------------------------------------------------------------------------
# Write: JSON, Markdown, plot, the table of all claims
# ------------------------------------------------------------------------------------------------

def judged(row, result):
    """Return the verdict and our numbers, by the row's rule from the points."""
    found = {}
    for point in result["points"]:
        for metric, value in point["values"].items():
            found.setdefault(point["arm"], {}).setdefault(metric, []).append(value)
    return row.rule(found)


def write(row, result, folder):
    folder.mkdir(parents=True, exist_ok=True)
    result["verdict"], result["ours"] = judged(row, result)
    (folder / f"{row.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{row.name}.md").write_text(page(row, result))
    plot(row, result, folder / f"{row.name}.png")
    (folder / "README.md").write_text(table(folder))
    print(f"\n{row.name}: {result['verdict']}. {result['ours']}\n{folder / row.name}.md")


def page(row, result):
    """Return the Markdown page of a row's result."""
    rule = " ".join(row.rule.__doc__.split())
    lines = [f"# {row.claim}", "", f"**Verdict: {result['verdict']}.** {result['ours']}.", "",
             f"The paper: {row.paper}.", "", f"![all points]({row.name}.png)", "",
             f"The rule, written before the run: {rule}", ""]
    lines += [row.note, ""] if row.note else []
    metrics = list(result["points"][0]["values"])
    lines += ["| arm | seed | " + " | ".join(metrics) + " |", "|---" * (2 + len(metrics)) + "|"]
    for point in result["points"]:
        cells = [" ".join(f"{x:g}: {y:.3f};" for x, y in v).rstrip(";") if isinstance(v, list)
                 else f"{v:.4g}" for v in point["values"].values()]
        lines.append(f"| {point['arm']} | {point['seed']} | " + " | ".join(cells) + " |")
    lines += ["", f"`python reproduce.py {row.name}` runs these commands for each seed:", ""]
    for command in dict.fromkeys(c for arm in result["commands"].values() for c in arm):
        lines.append(f"    {command}")
    return "\n".join([*lines, "", f"{result['hours']} hours on {result['machine']}; "
                      f"{result['date']}, commit {', '.join(result['commits'])}.", ""])


def table(folder):
    """Return results/README.md: all rows, from the JSON files."""
    lines = ["# The paper's claims at small scale", "",
             "`python reproduce.py NAME` repeats a row and writes its files. Each verdict follows "
             "from a rule that was", "written before the run; the pages have the rule, all points, "
             "the commands, the hours and the machine.", "",
             "| row | claim | the paper | here | verdict |", "|---|---|---|---|---|"]
    for row in ROWS:
        path = folder / f"{row.name}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        name = f"[{row.name}]({row.name}.md)" if result else row.name
        ours, verdict = (result["ours"], result["verdict"]) if result else ("", "not run")
        lines.append(f"| {name} | {row.claim} | {row.paper} | {ours} | {verdict} |")
    return "\n".join(lines) + "\n"


def plot(row, result, path):
    """Draw every point and the means: one panel for each metric."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    points, arms = result["points"], list(result["commands"])
    metrics = [k for k in points[0]["values"] if not k.endswith(": low")]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines),
                                squeeze=False, layout="constrained")
    for axis, metric in zip(axes.flat, metrics):
        for k, arm in enumerate(arms):
            values = [p["values"][metric] for p in points if p["arm"] == arm]
            colour = f"C{k}"
            if not isinstance(values[0], list):
                axis.plot([k] * len(values), values, "o", color=colour, alpha=0.6)
                axis.plot([k - 0.25, k + 0.25], [mean(values)] * 2, color=colour, lw=2)
                continue
            x = [pair[0] for pair in values[0]]
            for pairs in values:
                axis.plot(x, [y for _, y in pairs], "o", color=colour, alpha=0.5, ms=4)
            means = [mean(ys) for ys in zip(*([y for _, y in pairs] for pairs in values))]
            axis.plot(x, means, color=colour, label=arm)
        if isinstance(values[0], list):
            axis.set_xlabel(row.x)
            axis.legend(fontsize=8)
            if row.x == "N":
                axis.set_xscale("log", base=2)
        else:
            axis.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=9)
        axis.set_title(metric, fontsize=11)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(metrics):]:
        axis.remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    p = cli.Parser(description=__doc__.split("\n")[0])
    names = [row.name for row in ROWS]
    p.add_argument("name", nargs="?", choices=names, metavar="NAME", help=", ".join(names))
    a = p.add_mutually_exclusive_group().add_argument
    a("--list", action="store_true", help="list the rows with their verdicts")
    a("--plot", action="store_true", help="only draw again what results/NAME.json holds")
    a("--quick", action="store_true", help="a short run of one seed, in runs/reproduce-quick")
    args = p.parse_args()
    if args.list:
        return print(table(ROOT / "results"))
    if not args.name:
        p.error("give the NAME of a row, or --list")
    row = ROWS[names.index(args.name)]
    if not args.plot:
        return reproduce(row, args.quick)
    path = ROOT / "results" / f"{row.name}.json"
    if not path.exists():
        raise UserError(f"{path} is not there; run python reproduce.py {row.name} first")
    write(row, json.loads(path.read_text()), path.parent)


if __name__ == "__main__":
    cli.main(main)
