"""The rows of reproduce.py: results/ agrees with its JSON files; each row's --quick runs.

    pytest tests/test_reproduce.py
    pytest tests/test_reproduce.py -m slow          # minutes: every command of every row, shortened
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import reproduce
from results import rows
from results.rows import NO, PARTLY, ROWS, YES

RESULTS = ROOT / "results"
WRITTEN = [row for row in ROWS if (RESULTS / f"{row.name}.json").exists()]


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
    assert points == {(arm, seed) for arm in row.arms for seed in row.seeds}
    assert [result["verdict"], result["ours"]] == list(reproduce.judged(row, result))


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


@pytest.mark.parametrize("narrow, wide, clean, verdict", [
    (0.40, 0.05, 0.05, YES), (0.40, 0.20, 0.05, PARTLY), (0.40, 0.20, 0.20, NO),
    (0.20, 0.05, 0.05, NO)])
def test_width_rule(narrow, wide, clean, verdict):
    m = {"v, D 64": {"flow loss": [narrow]}, "v, D 160": {"flow loss": [wide]},
         "x, D 64": {"flow loss": [clean]}}
    assert rows.width_rule(m)[0] == verdict


@pytest.mark.parametrize("small, large, verdict", [
    ([0.02, 0.03], [0.00, 0.01], YES), ([0.05, -0.01], [0.00, 0.01], PARTLY),
    ([0.01, 0.01], [0.02, 0.03], NO), ([-0.01, -0.01], [-0.02, -0.02], NO)])
def test_head_rule(small, large, verdict):
    m = {}
    for D, gains in ((112, small), (224, large)):
        for arm, loss in (("depth", [0.3] * 2), ("head", [0.3 - g for g in gains])):
            m[f"D {D}, {arm}"] = {"flow loss, unseen images": loss}
    assert rows.head_rule(m)[0] == verdict


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
@pytest.mark.parametrize("name", [name for name in reproduce.FIGURES if name != "training"])
def test_figures(name, tmp_path, monkeypatch):
    from results import figures
    monkeypatch.setattr(figures, "HERE", tmp_path)
    figures.draw(name)
    assert Image.open(tmp_path / f"{name}.png").width > 1000


def test_figure_of_the_default_run(tmp_path):
    from results import figures
    for k, step in enumerate((300, 600, 900, 1800)):
        Image.new("RGB", (530, 134), (60 * k, 0, 0)).save(tmp_path / f"step-{step:07d}.png")
    figures.training(tmp_path, tmp_path)
    assert Image.open(tmp_path / "training.png").width > 1000
