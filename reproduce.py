"""Repeat the paper's claims (arXiv 2601.16208) at small scale, one command per claim.

    python reproduce.py --list
    python reproduce.py width              # run what is missing, then write results/width.*
    python reproduce.py width --quick      # a smoke test of a minute, in runs/reproduce-quick
    python reproduce.py width --plot       # only draw results/width.png and .md again
    python reproduce.py figure-method      # draw results/method.png

A row holds its claim, the paper's numbers, the arms (commands that differ in one thing), the seeds,
what to measure, and the rule that turns the numbers into a verdict. The rule is written before the
run, or the row's note says when it was changed. Seeds are paired: arms with the same seed see the
same data, noise and initial draws.
"""
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean

import cli
from cli import UserError
from claims import ROWS, write_images

ROOT = Path(__file__).parent
UNFINISHED = "not finished"
FIGURES = ("method", "latents", "trajectory", "ranking")
# What --quick adds to each command. argparse keeps the last value of a flag.
TRAIN = "--steps 4 --batch 4 --log-every 1 --sample-every 0 --save-every 4"
QUICK = {"train_dit.py": f"{TRAIN} --sample-steps 1", "train_decoder.py": TRAIN,
         "tiny/train_encoder.py": TRAIN, "decoder": "--count 4", "judge": "--count 2",
         "vqa": "--count 8 --max-tokens 4", "flow": "--count 4 --times 0.5",
         "colours": "--count 4 --steps 1",
         "fid": "--count 4 --steps 1", "candidates": "--per-category 2 --n 4 --steps 1"}


# ------------------------------------------------------------------------------------------------
# Run
# ------------------------------------------------------------------------------------------------

def commands(row, arm, seed, root, quick):
    """Return the commands of one arm and seed. root: the folder of all rows."""
    name, found = re.sub(r"[^a-z0-9.]+", "-", arm.lower()).strip("-"), []
    for command in row.arms[arm]:
        if quick:
            script, task, *_ = command.split()
            command += " " + QUICK[task if script == "evaluate.py" else script]
            for long, short in row.quick:
                command = command.replace(long, short)
        folder = root / row.name
        found.append(command.format(root=root, row=folder, run=folder / f"{name}-{seed}",
                                    seed=seed))
    return found


def output_of(command, root):
    """Run a command, unless its output is in root/done -> {command, commit, seconds} and a
    training's log or an evaluation's last line. An interrupted training resumes."""
    path = root / "done" / f"{hashlib.sha256(command.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"\npython {command}", flush=True)
    script, *words = command.split()
    start, code, line = time.time(), commit(), ""       # the code may change during the run
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words], text=True,
                               stdout=subprocess.PIPE)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
    except KeyboardInterrupt:
        process.terminate()             # a training saves and stops
        process.communicate()
        raise
    if process.wait():
        raise UserError(f"python {command} ended with status {process.returncode}; the same "
                        "reproduce.py command goes on from there")
    found = {"command": command, "commit": code, "seconds": time.time() - start}
    found |= json.loads(line) if script == "evaluate.py" else training_log(words)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def training_log(words):
    """Return a finished training's log, and the seconds of its steps (also those before it was
    interrupted)."""
    path = Path(words[words.index("--out") + 1]) / "log.jsonl"
    log = [json.loads(text) for text in path.read_text().splitlines()]
    steps = [0] + [entry["step"] for entry in log]
    seconds = sum((b - a) * entry["step_s"] for a, b, entry in zip(steps, steps[1:], log))
    return {"log": log, "seconds": seconds}


def reproduce(row, quick):
    """Run what is missing of a row, one command at a time. The results are written after each arm
    and seed. A row that results/ has unfinished goes on from there, also on another machine."""
    root = Path("runs/reproduce-quick" if quick else "runs/reproduce")
    folder = root / "results" if quick else ROOT / "results"
    if quick:
        shutil.rmtree(root, ignore_errors=True)
        row = replace(row, seeds=row.seeds[:1])
    if row.data:
        write_images(root / row.name, row.data)
    result = begun(row, root, folder, quick)
    measured = [(point["arm"], point["seed"]) for point in result["points"]]
    counted = {c for arm, seed in measured for c in commands(row, arm, seed, root, quick)}
    for seed, arm in itertools.product(row.seeds, row.arms):
        if (arm, seed) in measured:
            continue
        outputs = [output_of(c, root) for c in commands(row, arm, seed, root, quick)]
        result["points"].append({"arm": arm, "seed": seed, "values": row.measure(outputs, arm)})
        seconds = sum(out["seconds"] for out in outputs if out["command"] not in counted)
        counted.update(out["command"] for out in outputs)       # arms may share a training
        result["hours"] = round(result["hours"] + seconds / 3600, 2)
        result["machines"] = sorted({*result["machines"], machine()})
        result["commits"] = sorted({*result["commits"], *(out["commit"] for out in outputs)})
        result["date"] = time.strftime("%Y-%m-%d")
        write(row, result, folder)


def begun(row, root, folder, quick):
    """Return the unfinished result in results/ if its commands are the same, else an empty one."""
    empty = {"name": row.name, "claim": row.claim, "paper": row.paper, "points": [],
             "commands": {arm: [f"python {c}" for c in commands(row, arm, "SEED", root, quick)]
                          for arm in row.arms},
             "hours": 0, "machines": [], "commits": []}
    path = folder / f"{row.name}.json"
    old = json.loads(path.read_text()) if path.exists() else empty
    same = old["commands"] == empty["commands"] and judged(row, old)[0] == UNFINISHED
    return old if same else empty


def commit():
    """Return the repository's short commit, or `unknown` without git or a repository."""
    if not shutil.which("git"):
        return "unknown"
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
    """Return the verdict and our numbers, by the row's rule from the points; None without a rule.
    """
    runs = len(row.arms) * len(row.seeds)
    if len(result["points"]) < runs:
        return UNFINISHED, f"{len(result['points'])} of {runs} runs"
    found = {}
    for point in result["points"]:
        for metric, value in point["values"].items():
            found.setdefault(point["arm"], {}).setdefault(metric, []).append(value)
    return row.rule(found) if row.rule else (None, None)


def write(row, result, folder):
    folder.mkdir(parents=True, exist_ok=True)
    result["verdict"], result["ours"] = judged(row, result)
    (folder / f"{row.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{row.name}.md").write_text(page(row, result))
    plot(row, result, folder / f"{row.name}.png")
    (folder / "README.md").write_text(table(folder))
    print(f"\n{folder / row.name}.md" + (f"  {result['verdict']}: {result['ours']}" if row.rule
                                         else ""))


def page(row, result):
    """Return the Markdown page of a row's result."""
    lines = [f"# {row.claim}", ""]
    if row.rule:
        lines += [f"**Verdict: {result['verdict']}.** {result['ours']}.", "",
                  f"The paper: {row.paper}.", "",
                  f"The rule: {' '.join(row.rule.__doc__.split())}", ""]
    lines += [f"![all points]({row.name}.png)", ""] + ([row.note, ""] if row.note else [])
    metrics = list(result["points"][0]["values"])
    lines += ["| arm | seed | " + " | ".join(metrics) + " |", "|---" * (2 + len(metrics)) + "|"]
    for point in result["points"]:
        cells = ["; ".join(f"{x:g}: {y:.3f}" for x, y in v) if isinstance(v, list) else f"{v:.4g}"
                 for v in point["values"].values()]
        lines.append(f"| {point['arm']} | {point['seed']} | " + " | ".join(cells) + " |")
    lines += ["", f"`python reproduce.py {row.name}` runs these commands for each seed:", ""]
    for command in dict.fromkeys(c for arm in result["commands"].values() for c in arm):
        lines.append(f"    {command}")
    return "\n".join([*lines, "", f"{result['hours']} hours on "
                      f"{' and '.join(result['machines'])}; {result['date']}, commit "
                      f"{', '.join(result['commits'])}.", ""])


def table(folder):
    """Return the README.md of results/: all rows, from the JSON files."""
    lines = ["# The paper's claims at small scale", "",
             "`python reproduce.py NAME` repeats a row and writes its files. Each verdict follows "
             "from a rule that was", "written before the run; a page says when its rule was "
             "changed. The pages have the rule, all points,", "the commands, the hours and the "
             "machine.", "",
             "| row | claim | the paper | here | verdict |", "|---|---|---|---|---|"]
    for row in (row for row in ROWS if row.rule):
        path = folder / f"{row.name}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        name = f"[{row.name}]({row.name}.md)" if result else row.name
        ours, verdict = (result["ours"], result["verdict"]) if result else ("", "not run")
        lines.append(f"| {name} | {row.claim} | {row.paper} | {ours} | {verdict} |")
    lines += ["", "Not shown here: the size of the LLM (there is no pretrained family at this "
              "scale), WebSSL against SigLIP-2", "(no pretrained encoders), and web scale itself.",
              "", "[expected](expected.md): what the default `python train_dit.py` should show at "
              "each step.", "",
              "`python reproduce.py figure-NAME` draws more: [method](method.png), "
              "[latents](latents.png), [trajectory](trajectory.png), [ranking](ranking.png)."]
    return "\n".join(lines) + "\n"


def plot(row, result, path):
    """Draw every point and the means, one panel for each metric."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics = [k for k in result["points"][0]["values"] if not k.endswith(": low")]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines),
                                squeeze=False, layout="constrained")
    for axis, metric in zip(axes.flat, metrics):
        panel(axis, row, metric, result["points"])
    for axis in axes.flat[len(metrics):]:
        axis.remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axis, row, metric, points):
    """Draw one metric: numbers above the names of the arms, or a curve for each arm."""
    curve = isinstance(points[0]["values"][metric], list)
    arms = [arm for arm in row.arms if any(p["arm"] == arm for p in points)]
    for k, arm in enumerate(arms):
        values = [p["values"][metric] for p in points if p["arm"] == arm]
        if not curve:
            axis.plot([k] * len(values), values, "o", color=f"C{k}", alpha=0.6)
            axis.plot([k - 0.25, k + 0.25], [mean(values)] * 2, color=f"C{k}", lw=2)
            continue
        for pairs in values:
            axis.plot(*zip(*pairs), "o", color=f"C{k}", alpha=0.5, ms=4)
        means = [(pairs[0][0], mean(y for _, y in pairs)) for pairs in zip(*values)]
        axis.plot(*zip(*means), color=f"C{k}", label=arm)
    if curve:
        axis.set_xlabel(row.x)
        axis.legend(fontsize=8)
        if row.log_x:
            axis.set_xscale("log", base=2 if row.x == "N" else 10)
        if row.log_y:
            axis.set_yscale("log")
    else:
        axis.set_xticks(range(len(arms)), arms, rotation=20, ha="right", fontsize=9)
    axis.set_title(metric, fontsize=11)
    axis.grid(alpha=0.3)


def main():
    p = cli.Parser(description=__doc__.split("\n")[0])
    names = [row.name for row in ROWS]
    figures = [f"figure-{name}" for name in FIGURES]
    p.add_argument("name", nargs="?", choices=names + figures, metavar="NAME",
                   help=", ".join(names + figures))
    a = p.add_mutually_exclusive_group().add_argument
    a("--list", action="store_true", help="list the rows with their verdicts")
    a("--plot", action="store_true", help="write the plot and the page again, without a run")
    a("--quick", action="store_true", help="a short run of one seed, in runs/reproduce-quick")
    args = p.parse_args()
    if args.list:
        return print(table(ROOT / "results"))
    if not args.name:
        p.error("give the NAME of a row, or --list")
    if args.name in figures:
        from tiny.figures import draw                # it imports torch and matplotlib
        return draw(args.name.removeprefix("figure-"))
    row = ROWS[names.index(args.name)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.plot:
        return reproduce(row, args.quick)
    path = ROOT / "results" / f"{row.name}.json"
    if not path.exists():
        raise UserError(f"{path} is not there; run python reproduce.py {row.name} first")
    write(row, json.loads(path.read_text()), path.parent)


if __name__ == "__main__":
    cli.main(main)
