"""The rows of reproduce.py: results/ agrees with its JSON files; each row's --quick runs.

    pytest tests/test_reproduce.py
    pytest tests/test_reproduce.py -m slow          # minutes: every command of every row, shortened
"""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import reproduce
import claims
from claims import NO, PARTLY, ROWS, YES

RESULTS = ROOT / "results"
WRITTEN = [row for row in ROWS if (RESULTS / f"{row.name}.json").exists()]


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert reproduce.commit() == "unknown"


def test_the_table_follows_from_the_json_files():
    assert (RESULTS / "README.md").read_text() == reproduce.table(RESULTS)


def test_a_row_without_a_result_is_marked(tmp_path):
    lines = [line for line in reproduce.table(tmp_path).splitlines() if line.endswith("not run |")]
    assert len(lines) == len([row for row in ROWS if row.rule])


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: row.name)
def test_a_written_row_follows_from_its_points(row):
    result = json.loads((RESULTS / f"{row.name}.json").read_text())
    assert (RESULTS / f"{row.name}.png").is_file()
    assert (RESULTS / f"{row.name}.md").read_text() == reproduce.page(row, result)
    points = {(point["arm"], point["seed"]) for point in result["points"]}
    every = {(arm, seed) for arm in row.arms for seed in row.seeds}
    assert points <= every and len(points) == len(result["points"])
    assert points == every or result["verdict"] == reproduce.UNFINISHED
    assert [result["verdict"], result["ours"]] == list(reproduce.judged(row, result))


def test_an_unfinished_row_goes_on(tmp_path, monkeypatch):
    """Its points are kept, also without runs/. Another command makes them worthless."""
    row = claims.Row("sizes", "larger is better", "Fig. 5", {"a": ["a {seed}"], "b": ["b {seed}"]},
                     (0, 1), lambda outputs, arm: {claims.LOSS: outputs[0]["flow"]},
                     claims.sizes_rule)
    ran = []
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    read = lambda: json.loads((tmp_path / "results/sizes.json").read_text())

    def output_of(command, root, last=3):
        if len(ran) == last:
            raise KeyboardInterrupt
        ran.append(command)
        return {"command": command, "seconds": 360, "commit": "c", "flow": 1.0 - len(ran) / 10}

    monkeypatch.setattr(reproduce, "output_of", output_of)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(row, quick=False)
    found = read()
    assert (found["verdict"], found["ours"]) == ("not finished", "3 of 4 runs")
    assert "| not finished |" in (tmp_path / "results/README.md").read_text()
    monkeypatch.setattr(reproduce, "output_of", lambda *a: output_of(*a, last=9))
    reproduce.reproduce(row, quick=False)
    assert ran == ["a 0", "b 0", "a 1", "b 1"] and read()["verdict"] == YES
    assert read()["points"][:3] == found["points"] and read()["hours"] == 0.4
    (tmp_path / "results/sizes.json").write_text(json.dumps(found))
    row.arms["a"] = ["c {seed}"]
    reproduce.reproduce(row, quick=False)
    assert ran[4:] == ["c 0", "b 0", "c 1", "b 1"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_commands(row):
    """Trainings name one loader worker and their seed; no command is left with a gap."""
    for arm in row.arms:
        for command in reproduce.commands(row, arm, 7, Path("runs/all"), quick=False):
            assert "{" not in command and "  " not in command
            script = ROOT / command.split()[0]
            assert script.is_file()
            if script.name.startswith("train_"):
                assert "--workers 1" in command and "--seed" in command, command


def test_finetune_starts_from_the_models_of_convergence():
    every = lambda row: {c for arm in row.arms
                         for c in reproduce.commands(row, arm, 1, Path("runs/all"), quick=False)}
    both = every(claims.FINETUNE) & every(claims.CONVERGENCE)
    shared = [c for c in both if c.startswith("train_")]
    assert len(shared) == 2 and all(c.startswith("train_dit.py --latent") for c in shared)


@pytest.mark.parametrize("short", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_scripts_know_every_flag(row, short, monkeypatch):
    for task in ("decoder", "judge", "colours", "candidates", "vqa", "flow", "fid"):
        stub = lambda args: None
        stub.__name__ = stub.__doc__ = task
        monkeypatch.setattr(evaluate, task, stub)
    for arm in row.arms:
        for command in reproduce.commands(row, arm, 7, Path("runs/all"), short):
            script, *words = command.split()
            monkeypatch.setattr(sys, "argv", [script, *words])
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            module.main() if module is evaluate else module.arguments()


def of(metric, **arms):
    """Return what a rule gets: {arm: {metric: values of the seeds}}."""
    return {arm: {metric: values} for arm, values in arms.items()}


def width(narrow, wide, clean):
    return of("flow loss", **{"v, D 64": [narrow], "v, D 160": [wide], "x, D 64": [clean]})


def shift(none, base, auto):
    return {arm: {"background right, %": [back], "colour right, %": [colour]} for arm, back, colour
            in (("none (1)", *none), ("base 4096 (1.22)", *base), ("auto (6.93)", *auto))}


def decoder(text, fd, web):
    """The second arm by its changes; two seeds."""
    first = {"PSNR of text, dB": [20, 20], "FD-enc of text": [0.2, 0.2],
             "PSNR of web, dB": [25, 25], "PSNR of synthetic, dB": [30, 30]}
    second = {"PSNR of text, dB": [20 + x for x in text], "FD-enc of text": [0.2 + fd] * 2,
              "PSNR of web, dB": [25 + web] * 2, "PSNR of synthetic, dB": [30, 30]}
    return {"web + synthetic": first, "+ text": second}


def best(right, low):
    curves = {"best 1 of N: right": [[[2 ** k, y] for k, y in enumerate(right)]],
              "best 1 of N: gain": [[[2 ** k, y - right[0]] for k, y in enumerate(right)]],
              "best 1 of N: low": [[[2 ** k, low] for k in range(len(right))]]}
    return {"prompt": curves, "yes": curves}


def noise(*gains):
    """The gain at each stage, for each seed."""
    curve = lambda ys: [[x, y] for x, y in zip(claims.STAGES, ys)]
    return of("FD-enc of generated images", **{
        "tau 0": [curve([1.0] * 5) for _ in gains],
        "tau 0.2": [curve([1 - g for g in seed]) for seed in gains]})


def heads(small, large):
    """The gains at D 112 and D 224 by seed."""
    return of(claims.LOSS, **{f"D {D}, {arm}": [0.3 - g * (arm == "head") for g in gains]
                            for D, gains in ((112, small), (224, large))
                            for arm in ("depth", "head")})


def need(rae, vae, plain):
    return of("images until right", **{
        "RAE": [rae], "VAE, shift auto (5.66)": [vae + 5000], "VAE, shift 3": [vae],
        "VAE, shift 10": [vae + 1000], "no captions": [plain], "random encoder": [40_000]})


def rise(rae, vae):
    curve = lambda x: [[0, 1.0], [64, 1.0], [256, 1 + x]]
    return of(claims.LOSS, **{"RAE, LLM + DiT": [curve(x) for x in rae],
                            "VAE, LLM + DiT": [curve(x) for x in vae]})


def mixture(*values):
    arms = ("clean, 1x", "alt text, 1x", "half, 1x", "clean, 2x", "alt text, 2x", "half, 2x")
    return of(claims.LOSS, **dict(zip(arms, ([v, v + 0.1] for v in values))))


CASES = [
    (claims.width_rule, width(0.40, 0.05, 0.05), YES),
    (claims.width_rule, width(0.40, 0.20, 0.05), PARTLY),
    (claims.width_rule, width(0.40, 0.20, 0.20), NO),
    (claims.width_rule, width(0.20, 0.05, 0.05), NO),
    (claims.shift_rule, shift((20, 10), (25, 10), (96, 91)), YES),
    (claims.shift_rule, shift((40, 10), (25, 10), (96, 91)), PARTLY),
    (claims.shift_rule, shift((20, 10), (25, 10), (96, 80)), PARTLY),
    (claims.shift_rule, shift((80, 10), (25, 10), (96, 91)), NO),
    (claims.decoder_rule, decoder((1, 2), -0.1, -0.2), YES),
    (claims.decoder_rule, decoder((1, 2), -0.1, -0.6), PARTLY),
    (claims.decoder_rule, decoder((1, -0.1), -0.1, 0), NO),
    (claims.best_rule, best([0.5, 0.6, 0.6, 0.7], 0.02), YES),
    (claims.best_rule, best([0.5, 0.6, 0.55, 0.7], 0.02), PARTLY),
    (claims.best_rule, best([0.5, 0.6, 0.6, 0.7], -0.02), PARTLY),
    (claims.best_rule, best([0.5, 0.5, 0.5, 0.49], -0.02), NO),
    (claims.noise_rule, noise([0, 0.3, 0.2, 0.1, 0.1], [0, 0.2, 0.2, 0.1, -0.1]), YES),
    (claims.noise_rule, noise([0, 0.3, 0.2, 0.1, 0.1], [0, 0.05, 0.2, 0.1, 0.1]), PARTLY),
    (claims.noise_rule, noise([0, 0.1, 0.2, 0.1, 0.2], [0, 0.1, 0.2, 0.1, 0.2]), NO),
    (claims.noise_rule, noise([0, -0.1, 0.2, 0.1, -0.2]), NO),
    (claims.understanding_rule, of("questions right, %", a=[60], b=[58], c=[59]), YES),
    (claims.understanding_rule, of("questions right, %", a=[60], b=[58], c=[50]), PARTLY),
    (claims.understanding_rule, of("questions right, %", a=[60], b=[64], c=[60]), NO),
    (claims.sizes_rule, of(claims.LOSS, a=[0.4], b=[0.3], c=[0.2]), YES),
    (claims.sizes_rule, of(claims.LOSS, a=[0.4], b=[0.2], c=[0.3]), PARTLY),
    (claims.sizes_rule, of(claims.LOSS, a=[0.4], b=[0.2], c=[0.4]), NO),
    (claims.head_rule, heads([0.02, 0.03], [0.00, 0.01]), YES),
    (claims.head_rule, heads([0.05, -0.01], [0.00, 0.01]), PARTLY),
    (claims.head_rule, heads([0.01, 0.01], [0.02, 0.03]), NO),
    (claims.head_rule, heads([-0.01, -0.01], [-0.02, -0.02]), NO),
    (claims.vae_rule, need(10_000, 20_000, 15_000), YES),
    (claims.vae_rule, need(10_000, 20_000, 25_000), PARTLY),
    (claims.vae_rule, need(20_000, 20_000, 15_000), NO),
    (claims.finetune_rule, rise([0.01, 0.04], [0.02, 0.3]), YES),
    (claims.finetune_rule, rise([0.10, 0.10], [0.2, 0.3]), PARTLY),
    (claims.finetune_rule, rise([0.03, 0.00], [0.02, 0.3]), PARTLY),
    (claims.finetune_rule, rise([0.2, 0.2], [0.1, 0.1]), NO),
    (claims.mixture_rule, mixture(0.35, 0.40, 0.34, 0.32, 0.36, 0.31), YES),
    (claims.mixture_rule, mixture(0.35, 0.40, 0.34, 0.32, 0.36, 0.33), PARTLY),
    (claims.mixture_rule, mixture(0.35, 0.40, 0.34, 0.32, 0.36, 0.36), NO)]


@pytest.mark.parametrize("rule, found, verdict", CASES,
                         ids=[f"{rule.__name__}-{k}" for k, (rule, *_) in enumerate(CASES)])
def test_rules(rule, found, verdict):
    assert rule(found)[0] == verdict


def test_every_rule_has_all_its_verdicts_tested():
    assert {(rule, verdict) for rule, _, verdict in CASES} == {
        (row.rule, verdict) for row in ROWS if row.rule for verdict in (YES, PARTLY, NO)}


def quick(name, folder):
    done = subprocess.run([sys.executable, ROOT / "reproduce.py", name, "--quick"], cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_quick(row, tmp_path):
    before = sorted((p, p.stat().st_mtime) for p in RESULTS.iterdir())
    quick(row.name, tmp_path)
    folder = tmp_path / "runs/reproduce-quick/results"
    result = json.loads((folder / f"{row.name}.json").read_text())
    assert {point["arm"] for point in result["points"]} == set(row.arms)
    assert (folder / f"{row.name}.png").is_file() and (folder / f"{row.name}.md").is_file()
    assert sorted((p, p.stat().st_mtime) for p in RESULTS.iterdir()) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", reproduce.FIGURES)
def test_figures(name, tmp_path, monkeypatch):
    from tiny import figures
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.draw(name)
    assert Image.open(tmp_path / f"{name}.png").width > 1000
