"""The scripts as a user runs them: what they write, one after the other, and bad input of sample.py.
Resume: test_resume.py; bad input of the others: test_bad_input.py.

    pytest tests/test_scripts.py
"""
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cli
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--batch", "4", "--log-every", "1", "--sample-every", "3", "--save-every", "2"]
DIT = ["train_dit.py", *SMALL, "--sample-steps", "2", "--steps", "6"]


def run(*args, cwd=None, ok=True):
    args = [str(a) for a in args]
    done = subprocess.run([sys.executable, ROOT / args[0], *args[1:]], cwd=cwd or ROOT, env=ENV,
                          capture_output=True, text=True, timeout=400)
    if ok:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory):
    """One short uninterrupted run that several tests look at."""
    out = tmp_path_factory.mktemp("runs") / "dit"
    done = run(*DIT, "--out", out)
    return out, done


def test_readme_s_lines_for_python():
    section = (ROOT / "README.md").read_text().split("## From Python\n")[1].split("\n## ")[0]
    code = textwrap.dedent(section) + "print(image.shape, v.shape == z.shape, image.std() > 0.05)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True,
                          text=True)
    assert done.stdout == "torch.Size([1, 3, 64, 64]) True tensor(True)\n", done.stderr


def test_run_folder(dit_run):
    out, done = dit_run
    assert "background right" in done.stdout and "parameters" in done.stdout
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "lr", "images_per_s", "tflops", "mfu", "memory_gb", "data_wait_s", "text",
                "flow", "cond_spread"):
        assert key in lines[-1], key
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["text"] + 2 * lines[-1]["flow"], rel=1e-5)
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step-0000004", "step-0000006"]                         # --keep 2
    for name in ("args.json", "loss.png", "samples/step-0000003.png", "samples/step-0000006.png",
                 "final/model.safetensors", "final/ema.safetensors", "final/config.json",
                 "final/tokenizer.json"):
        assert (out / name).is_file(), name
    assert Image.open(out / "samples/step-0000006.png").size == (8 * 136 + 8, 2 * 210 + 8)
    keys = load_file(out / "final/model.safetensors")
    assert {"model.latent_queries", "model.mm_projector.0.weight", "diff_head_projector.weight",
            "diff_head.model.x_embedder.proj.weight"} <= keys.keys()


@pytest.mark.slow
def test_every_script_from_nothing(tmp_path):
    """encoder -> decoder -> DiT -> picture, answer and reconstruction, on files made just now."""
    small = ["--batch", "8", "--log-every", "2", "--sample-every", "4", "--save-every", "4"]
    done = run("tiny/train_encoder.py", *small, "--steps", "4", "--width", "48", "--depth", "2", "--out",
               tmp_path / "e")
    assert "retrieval" in done.stdout
    encoder = tmp_path / "e/final/model.safetensors"
    done = run("train_decoder.py", *small, "--steps", "4", "--encoder", encoder, "--out",
               tmp_path / "d")
    assert "PSNR" in done.stdout
    decoder = tmp_path / "d/final/ema.safetensors"
    parts = ["--encoder", encoder, "--decoder", decoder]
    run("train_dit.py", *small, "--steps", "4", *parts, "--llm", tmp_path / "e", "--sample-steps",
        "2", "--out", tmp_path / "t")
    model = ["--run", tmp_path / "t", *parts]
    run("sample.py", "a red circle", "--direct", "--steps", "3", *model, "--out", tmp_path / "a.png",
        "--save-latent", tmp_path / "z.safetensors")
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (64, 64) and picture.info["prompt"] == "a red circle"
    run("sample.py", "--latent", tmp_path / "z.safetensors", *model, "--out", tmp_path / "b.png")
    assert (tmp_path / "b.png").is_file()
    run("sample.py", "--image", tmp_path / "a.png", "what is it?", "--max-tokens", "4", *model)
    run("sample.py", "--reconstruct", tmp_path / "a.png", *model, "--out", tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size == (66 + 64, 64)


@pytest.mark.slow
def test_shipped_weights_draw_the_same_image_twice(tmp_path):
    """In any batch, up to rounding: the noise belongs to (prompt, seed)."""
    command = ["sample.py", "a red circle left of a blue star", "--steps", "10"]
    run(*command, "--out", tmp_path / "a.png")
    run(*command, "--n", "3", "--out", tmp_path / "b.png")
    a, b = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b-0.png")
    pixels = lambda image: np.asarray(image, np.int16)
    assert abs(pixels(a) - pixels(b)).max() <= 1
    assert Image.open(tmp_path / "b-1.png").tobytes() != a.tobytes()


@pytest.mark.parametrize("where, error, status, says", [
    ("train_dit.ScaleRAE.forward", "RuntimeError", 1, "RuntimeError: out of memory"),
    pytest.param("train_dit.ScaleRAE.forward", "KeyboardInterrupt", -2, "interrupted",
                 marks=pytest.mark.slow),
    ("data.Mixture.__getitem__", "cli.DataError", 2, "error: out of memory")])
def test_an_error_ends_the_process(where, error, status, says, tmp_path):
    """The traceback holds the loader, whose workers ignore SIGTERM, and yet the process ends. The
    third error is raised in a worker."""
    code = f"""import sys
sys.argv = ["train_dit.py", "--batch", "4", "--workers", "1", "--out", {str(tmp_path / "run")!r}]
sys.argv += ["--bench", "2"] if {error!r} == "KeyboardInterrupt" else []
import cli, data, train_dit
before = {where}
def fails(self, i, *rest):
    if isinstance(i, int) and i < 16:           # what the plan looks at
        return before(self, i)
    raise {error}("out of memory")
{where} = fails
cli.main(train_dit.main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True,
                          text=True, timeout=200)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, says)
    assert ("Traceback" in done.stderr) == (status == 1)


def test_a_closed_output_ends_without_a_traceback():
    """As by `| head` and by `>&-`. A broken pipe of another kind is a mistake."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, ROOT / "reproduce.py", "--list"], stdout=write,
                          stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
    done = subprocess.run(f"{sys.executable} {ROOT}/reproduce.py --list >&-", shell=True,
                          stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")

    def mistake():
        raise BrokenPipeError("a worker's")
    with pytest.raises(BrokenPipeError, match="a worker's"):
        cli.main(mistake)


def test_dry_run_and_bench(tmp_path):
    done = run("train_dit.py", "--dry-run", "--json")
    summary = json.loads(done.stdout)
    assert summary["latent"] == [64, 96] and summary["alpha"] == pytest.approx(6.9282, abs=1e-3)
    assert sum(v for k, v in summary["parameters"].items() if k != "total") == \
        summary["parameters"]["total"]
    done = run("train_dit.py", "--bench", "4", "--batch", "4", "--save-every", "1", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["images_per_s"] > 0
    assert not (tmp_path / "runs").exists()


# what is typed, what the one line must say
BAD = [
    (["sample.py"], ["prompt"]),
    (["sample.py", ""], ["empty|prompt"]),
    (["sample.py", "a cat", "--steps", "0"], ["--steps"]),
    (["sample.py", "a cat", "--run", "no/such/run"], ["no/such/run", "--run"]),
    (["sample.py", "--image", "tiny/sprites.tar", "what?"], ["tiny/sprites.tar"]),
    (["sample.py", "--reconstruct", "missing.png"], ["missing.png"]),
    (["sample.py", "--latent", "missing.safetensors"], ["missing.safetensors"]),
    (["sample.py", "--prompts", "missing.txt"], ["missing.txt"]),
]


@pytest.mark.parametrize("command, words", BAD, ids=[" ".join(c) for c, _ in BAD])
def test_bad_input_is_one_clear_line(command, words, tmp_path, monkeypatch, capsys):
    """Exit status 2, the value and the flag in the message, no traceback, nothing written."""
    script = importlib.import_module(command[0].removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / a) if (ROOT / a).is_file() else a for a in command])
    with pytest.raises(SystemExit) as stopped:
        cli.main(script.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error:") == 1
    for word in words:
        assert any(w in said for w in word.split("|")), (word, said)
    assert not list(tmp_path.iterdir())
