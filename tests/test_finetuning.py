"""Finetuning on images of one's own, and what the terminal shows of a run.

    pytest tests/test_finetuning.py
"""
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cli
import data
import parallel
import recipe
import stage2
import text_model
import train_dit
import training
import weights
from dit import SIZES, DiTConfig
from prompts import sample_prompts
from test_stage2 import CAPTIONED, TOKENIZER, train
from tiny import judge

COLOURS = ("red", "green", "blue", "yellow", "black")
MODEL = stage2.Stage2(Namespace(tokens=64), None, TOKENIZER, Namespace(context=1024))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images with captions, and a damaged one."""
    folder = tmp_path_factory.mktemp("photos")
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} wall")
    (folder / "zebra.png").write_bytes((folder / "red.png").read_bytes()[:50])
    (folder / "zebra.txt").write_text("a zebra")
    return folder


@pytest.fixture
def plan(monkeypatch, capsys):
    """Call train_dit.py with --dry-run -> its table as a dict."""
    def call(*args):
        words = ["--dry-run", "--json", "--device", "cpu", *args]
        monkeypatch.setattr(sys, "argv", ["train_dit.py", *map(str, words)])
        train_dit.main()
        return json.loads(capsys.readouterr().out)
    return call


# ------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------

def test_no_flag_is_needed(photos, plan):
    """The shift of the checkpoint, finetuning rates, steps from the number of images, a run folder
    of its own. Without --init, nothing follows from the data."""
    told = plan("--init", "tiny", "--data", photos)
    assert (told["alpha"], told["run"]) == (3, "runs/dit-tiny-finetuned")
    assert told["learning_rates"] == {"dit": 3e-4, "llm": 2e-4}
    assert (told["steps"], told["epochs"]) == (300, 300 * 32 / 6)
    assert told["sample_prompts"] == 6 and told["trained"]["llm"] == told["parameters"]["llm"]
    frozen = plan("--init", "tiny", "--data", photos, "--freeze", "llm")
    assert frozen["trained"]["llm"] == 64 * 128 + 128 * 160 + 160       # queries, projector to DiT
    assert frozen["trained"]["dit"] == told["trained"]["dit"] == (      # all but the positions
        told["parameters"]["dit"] - 64 * 160)
    assert told["frozen"].keys() == {"dit", "encoder"}
    assert frozen["frozen"].keys() == {"dit", "llm", "encoder"}
    told = plan("--data", photos)
    assert (told["steps"], told["run"]) == (1800, "runs/dit-tiny")
    assert told["learning_rates"] == {"dit": 1.5e-3, "llm": 1e-3}


@pytest.mark.parametrize("flags, steps", [
    (["--batch", 4, "--data", "builtin:hq"], 600),                      # 4 epochs of 600 images
    (["--batch", 32, "--data", "builtin:hq"], 300), (["--data", "builtin:web"], 1800),
    (["--batch", 7, "--epochs", 0.5, "--data", "builtin:hq"], 43), (["--steps", 9], 9)])
def test_steps_follow_from_the_data(flags, steps, plan):
    assert plan("--init", "tiny", *flags)["steps"] == steps


def test_larger_sizes_take_the_paper_s_rates(monkeypatch):
    """Table 8's finetuning, with the batch of 1,024."""
    row = SIZES["0.5b"]
    config = stage2.ModelConfig(DiTConfig(1152, 256, row.width, row.depth, row.heads),
                                text_model.QWEN_1_5B, 1152, 8.49, "an encoder", "a decoder")
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--size", "0.5b", "--data", "photos"])
    args = recipe.arguments()
    recipe.fill_defaults(args, config)
    assert (args.lr, args.lr_llm, args.warmup, args.batch) == (5.66e-4, 5.66e-5, 0.03, 1024)
    assert (args.encoder, args.decoder) == ("an encoder", "a decoder")
    assert args.out == Path("runs/dit-0.5b-finetuned")
    assert [recipe.count_steps(args, n) for n in (40, 60_000, 200_000)] == [300, 300, 782]


# ------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------

def test_a_run_on_photos(photos, tmp_path, monkeypatch, capsys):
    """Its samples are the captions of the user, with their text; no toy shapes are drawn; the
    broken image is named. The bar has loss and time left from step 1, and fits 80 columns."""
    monkeypatch.setenv("COLUMNS", "81")                                 # tqdm takes one less
    monkeypatch.setattr(training, "check_colours", None)
    drawn, real = [], data.contact_sheet
    monkeypatch.setattr(data, "contact_sheet", lambda images, texts, *rest: (
        drawn.append((len(images), texts)), real(images, texts, *rest))[1])
    lines = train(tmp_path / "r", "--init", "tiny", "--data", photos, "--steps", 3,
                  "--sample-every", 2, "--save-every", 3, "--log-every", 2)
    captions = [*sorted(f"a {colour} wall" for colour in COLOURS), "a zebra"]
    assert drawn == [(6, captions)] * 2
    assert Image.open(tmp_path / "r/samples/step-0000002.png").size == (6 * 136 + 8, 210 + 8)
    assert [line["step"] for line in lines] == [2, 3] and lines[1]["skipped_records"] > 0
    said = capsys.readouterr()
    assert said.err.count("skipped ") == said.err.count("zebra.png: ") == 1
    assert "toy shapes" not in said.out + said.err
    bar = [line for line in re.split("[\r\n]|skipped ", said.err) if "%|" in line]
    assert max(map(len, bar)) <= 80
    first = next(line for line in bar if " 1/3 " in line and "loss" in line)
    assert re.search(r" 1/3 \[\d\d:\d\d<\d\d:\d\d, loss \d", first)
    assert any("drawing samples" in line for line in bar) and any("saving" in line for line in bar)
    args = json.loads((tmp_path / "r/args.json").read_text())
    assert (args["lr"], args["warmup"], args["shift"]) == (3e-4, 0.1, 3)


def test_parameters_that_init_lacks():
    """As LoRA of a fork: refused, unless the call says that they are new."""
    devices = parallel.setup("cpu", "float32")
    args = Namespace(init=weights.TINY, size=None, latent=None, seed=3, repa=0, freeze=None,
                     remat="none", allow_narrow=False, **dict.fromkeys([*recipe.DIT_FLAGS,
                                                                        *recipe.LLM_FLAGS]))
    init, config = stage2.open_init(args)
    with torch.device("meta"):
        model = train_dit.build(config, args, torch.float32)
        attention = model.llm.model.layers[0].self_attn
        attention.update = torch.nn.Parameter(torch.empty(128, 8))
    initial = lambda name, shape, seed: torch.full(shape, float(seed))
    with pytest.raises(cli.UserError, match="layers.0.self_attn.update"):
        stage2.initial_rows(model, initial, args, init, None, TOKENIZER)
    rows = stage2.initial_rows(model, initial, args, init, None, TOKENIZER, new=("update",))
    parallel.build(model, rows, devices)
    assert (attention.update == 3).all() and attention.q_proj.weight.std() > 0.01


def test_samples_that_are_not_finite_are_named(tmp_path, capsys):
    image = torch.full((1, 3, 64, 64), 0.5)
    training.save_captioned(image, ["a wall"], tmp_path / "a.png")
    assert not capsys.readouterr().err
    image[0, 0, 0, 0] = torch.nan
    training.save_captioned(image, ["a wall"], tmp_path / "b.png")
    assert "b.png: an image holds NaN" in capsys.readouterr().err
    assert (tmp_path / "b.png").is_file()


def test_toy_data_are_judged(tmp_path, capsys):
    """The check is announced by its bar."""
    train(tmp_path / "r", "--init", "tiny", "--data", "builtin:hq")
    said = capsys.readouterr()
    assert "128 unseen single shapes" in said.out and "checking 128 toy shapes: 100%" in said.err


def test_sample_prompts_of_a_file(photos, tmp_path, monkeypatch):
    file, drawn, real = tmp_path / "prompts.txt", [], data.contact_sheet
    file.write_text("a red circle\n\n  two cats\n")
    monkeypatch.setattr(data, "contact_sheet", lambda images, texts, *rest: (
        drawn.extend(texts), real(images, texts, *rest))[1])
    train(tmp_path / "r", "--data", photos, "--sample-prompts", file, "--sample-every", 1)
    assert drawn == ["a red circle", "two cats"]


def test_prompts_are_captions_of_the_first_records(tmp_path):
    """Of each source its share of 16, each text once; requests of conversations; no questions, and
    no text that training rejects."""
    ask = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    draw = [{"from": "human", "value": "Draw a cat."}, CAPTIONED[1]]
    records = [{"caption": "one"}, {"caption": "one"}, {"conversations": ask},
               {"conversations": draw}, {"caption": "a <|im_end|>"}, {"caption": 3},
               {"caption": "b " * 2000}, {"text": "two"}, {"caption": "the ninth"}]
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(
            json.dumps({"image": "x.png", **r}) for r in records))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    mixture = data.Mixture([a, b, "builtin:web"], 64)
    assert sample_prompts(None, mixture, MODEL) == ["one", "Draw a cat.", "two"]
    mixture = data.Mixture([a], 64)
    assert sample_prompts(None, mixture, MODEL)[-1] == "the ninth"
    assert sample_prompts(None, data.Mixture(["builtin:web"], 64), MODEL) == judge.FIXED


# ------------------------------------------------------------------------------------------------
# The terminal
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ["tiny", "9b"])
def test_the_start_table_fits_and_has_units(size, monkeypatch, capsys):
    words = ["train_dit.py", "--dry-run", "--size", size, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(training, "start_table", lambda *a, files, table=training.start_table, **k:
                        table(*a, files="", **k))                       # paths are of any length
    train_dit.main()
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"training per image +dit [\d.e-]+ TFLOP,", table)
    assert re.search(r"state per device +weights [\d.]+ GB,", table)
    assert re.search(r"\n  steps +[\d,]+\n  learning rates +dit [\d.e-]+, llm", table)


def test_idle_gpus_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--data", "my photos"])
    args = Namespace(batch=8, micro_batch=8, dry_run=False, json=False)
    for world, said in ((1, "7 of 8 GPUs are idle"), (8, "")):
        gpus = parallel.Devices("cuda", torch.device("cpu"), 0, world, torch.bfloat16,
                                {"fsdp": world, "tensor": 1})
        training.start_table("title", args, gpus, {}, {}, {})
        err = capsys.readouterr().err
        assert said in err and ("--nproc-per-node 8 train_dit.py --data 'my photos'" in err) == (
            world == 1)


def test_an_unknown_flag_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--learning-rate", "3"])
    with pytest.raises(SystemExit):
        cli.main(train_dit.main)
    said = capsys.readouterr().err
    assert said.startswith("error: unrecognized arguments: --learning-rate")
    assert said.count("\n") == 1
