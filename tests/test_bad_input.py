"""Bad input of the training scripts and the data readers: exit status 2, one line that names the
flag and the value, no traceback, before long work, and nothing is written.

    pytest tests/test_bad_input.py
"""
import importlib
import importlib.util
import json
import os
import random
import shlex
import signal
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                      # a missing file is not waited for
import cli                                                              # noqa: E402
import losses                                                           # noqa: E402

torch.set_num_threads(1)

TINY = ROOT / "tiny"

# The command, and what its one line must say; a|b: one of the two. IN/ is the folder of `inputs`,
# AT/ is tiny/.
DIT, DECODER, ENCODER = "train_dit.py", "train_decoder.py", "tiny/train_encoder.py"
BAD = [
    # numbers out of their range
    (f"{DIT} --steps -1", ["--steps", "'-1'", "positive"]),
    (f"{DIT} --steps 0", ["--steps", "'0'", "positive"]),
    (f"{DIT} --steps 1.5", ["--steps", "'1.5'"]),
    (f"{DIT} --batch 0", ["--batch", "'0'"]),
    (f"{DIT} --micro-batch 0", ["--micro-batch", "'0'"]),
    (f"{DIT} --batch 6 --micro-batch 4", ["--batch 6", "--micro-batch", "4"]),
    (f"{DECODER} --batch 4 --micro-batch 8", ["--batch 4", "--micro-batch", "8"]),
    (f"{DIT} --seed -1", ["--seed", "'-1'"]),
    (f"{DIT} --seed 5000000000", ["--seed", "5000000000"]),
    (f"{DIT} --workers -1", ["--workers", "'-1'"]),
    (f"{DIT} --keep 0", ["--keep", "'0'"]),
    (f"{DIT} --save-every 0", ["--save-every", "'0'"]),
    (f"{DIT} --bench 0", ["--bench", "'0'"]),
    (f"{DIT} --scan", ["--scan", "xla"]),
    (f"{DIT} --device xla --dry-run --optimizer muon", ["--optimizer muon", "xla"]),
    (f"{DIT} --dry-run --device xla --compile", ["--compile", "xla"]),
    (f"{DECODER} --dry-run --device xla --compile", ["--compile", "xla"]),
    (f"{DIT} --epochs 2 --steps 5", ["--epochs", "--steps"]),
    (f"{DIT} --epochs 2 --data builtin:web", ["--epochs 2", "builtin:web", "endless"]),
    (f"{DIT} --lr 0", ["--lr", "'0'"]),
    (f"{DIT} --lr-llm inf", ["--lr-llm", "'inf'"]),
    (f"{DIT} --epochs 1e308", ["--epochs", "'1e308'"]),
    (f"{DIT} --warmup 1.5", ["--warmup", "1.5"]),
    (f"{DIT} --ema 1", ["--ema", " 1"]),
    (f"{DIT} --cond-drop 1", ["--cond-drop", " 1"]),
    (f"{DIT} --betas 0.9 1", ["--betas", " 1"]),
    (f"{DIT} --betas-llm nan 0.9", ["--betas-llm", "nan"]),
    (f"{DIT} --clip -1", ["--clip", "'-1'"]),
    (f"{DIT} --diffusion-weight nan", ["--diffusion-weight", "'nan'"]),
    (f"{DIT} --shift nonsense", ["--shift", "nonsense"]),
    (f"{DIT} --shift -2", ["--shift", "-2"]),
    (f"{DIT} --shift-base 0", ["--shift-base", "'0'"]),
    (f"{DIT} --guidance -1", ["--guidance", "'-1'"]),
    (f"{DIT} --sample-steps 0", ["--sample-steps", "'0'"]),
    (f"{DIT} --length 60", ["--length 60", "more than 60"]),
    (f"{DIT} --sample-prompts IN/none", ["--sample-prompts", "IN/none"]),
    (f"{DIT} --sample-prompts IN/empty", ["--sample-prompts", "IN/empty", "no prompt"]),
    (f"{DIT} --sample-prompts IN/special.txt", ["--sample-prompts", "special.txt", "<|im_end|>"]),
    (f"{DIT} --sample-prompts IN/image.txt", ["--sample-prompts", "image.txt", "<image>"]),
    (f"{DIT} --sample-prompts IN/half.jsonl", ["--sample-prompts", "half.jsonl", "not valid Unicode"]),
    (f"{DECODER} --lr nan", ["--lr", "'nan'"]),
    (f"{DECODER} --ema 1", ["--ema", " 1"]),
    (f"{DECODER} --betas 1 1", ["--betas", " 1"]),
    (f"{DECODER} --warmup -5", ["--warmup", "-5"]),
    (f"{DECODER} --disc-start 7x", ["--disc-start", "'7x'"]),
    (f"{DECODER} --gan 1 --disc-start 200 --gan-start 100", ["--gan-start 100", "--disc-start 200"]),
    (f"{DECODER} --gram-layers 5", ["--gram-layers", "5"]),
    (f"{DECODER} --lpips -1", ["--lpips", "'-1'"]),
    (f"{DECODER} --noise-tau -1", ["--noise-tau", "'-1'"]),
    (f"{DECODER} --latent webssl", ["--encoder", "weights are missing"]),
    (f"{ENCODER} --mask 1.5", ["--mask", "1.5"]),
    (f"{ENCODER} --warmup -1", ["--warmup", "'-1'"]),
    (f"{ENCODER} --dense -1", ["--dense", "'-1'"]),
    # sizes and choices that do not go together
    (f"{DIT} --size 7b", ["--size", "0.5b"]),
    (f"{DIT} --head-width 256", ["--head-width", "--head-depth"]),
    (f"{DIT} --head-width 250 --head-depth 2", ["250", "4 x heads"]),
    (f"{DIT} --repa 7", ["--repa 7", "6 blocks"]),
    (f"{DIT} --vae IN/empty", ["--vae", "--latent vae"]),
    (f"{DIT} --latent vae --decoder IN/none", ["--decoder", "--latent vae"]),
    (f"{DIT} --random-init", ["--random-init", "tiny"]),
    (f"{DIT} --init AT --llm random", ["--llm", "--init"]),
    (f"{DIT} --out . --fresh", ["--out .", "working folder"]),
    (f"{DIT} --out ''", ["--out", "it is empty"]),
    (f"{DIT} --sample-prompts ''", ["--sample-prompts", "it is empty"]),
    (f"{DIT} --latent webssl", ["--latent webssl", "--encoder"]),
    (f"{DIT} --latent clip", ["--latent", "'clip'", "siglip2"]),
    (f"{DIT} --freeze dit", ["--freeze", "'dit'", "llm"]),
    (f"{DIT} --dtype float16", ["--dtype", "'float16'", "bfloat16"]),
    (f"{DIT} --remat all", ["--remat", "'all'", "block"]),
    (f"{DIT} --mesh fsdp=3", ["--mesh fsdp=3", "there are 1"]),
    (f"{DIT} --mesh data=1", ["--mesh data=1", "fsdp"]),
    (f"{DIT} --mesh fsdp=0", ["--mesh fsdp=0", "fsdp"]),
    (f"{DIT} --dry-run --device cpu --mesh fsdp=4,tensor=2", ["--mesh fsdp=4,tensor=2", "xla"]),
    (f"{DIT} --device cuda", ["--device cuda"]),
    (f"{DIT} --device xla", ["--device xla", "torch_xla"]),
    (f"{DIT} --wandb project", ["--wandb project", "pip install"]),
    (f"{DECODER} --size huge", ["--size", "'huge'", "xl"]),
    (f"{DECODER} --latent vae --patch 8", ["--patch", "vae"]),
    (f"{ENCODER} --resolution 60", ["--resolution 60", "--patch 8"]),
    (f"{ENCODER} --width 97", ["--width 97", "--heads"]),
    (f"{ENCODER} --arch vgg --depth 3", ["--arch vgg", "--depth"]),
    (f"{ENCODER} --arch vgg --dense 1", ["--dense", "--arch vgg"]),
    # weights
    (f"{DIT} --encoder IN/none.safetensors", ["--encoder", "none.safetensors"]),
    (f"{DIT} --size 2b", ["--encoder google/siglip2", "--llm Qwen/", "--decoder ", "weights/"]),
    (f"{DIT} --encoder siglip2", ["--encoder siglip2", "has weights", "hub id"]),
    (f"{DIT} --encoder IN/notes.txt", ["--encoder", "notes.txt"]),
    (f"{DIT} --encoder IN/cut.safetensors", ["--encoder", "cut.safetensors"]),
    (f"{DIT} --encoder IN/code.pt", ["--encoder", "code.pt", "holds code to run"]),
    (f"{DIT} --encoder IN/empty", ["--encoder", "IN/empty", "no weights"]),
    (f"{DIT} --encoder AT/decoder.safetensors", ["--encoder", "decoder.safetensors"]),
    (f"{DIT} --encoder IN/shape.safetensors", ["--encoder", "shape.safetensors", "[3, 5]"]),
    (f"{DIT} --decoder AT/encoder.safetensors", ["--decoder", "not a decoder"]),
    (f"{DIT} --llm IN/empty", ["IN/empty", "tokenizer.json"]),
    (f"{DIT} --llm IN/slow", ["IN/slow", "added_tokens.json"]),
    (f"{DIT} --latent vae --vae AT/encoder.safetensors", ["--vae", "encoder.safetensors"]),
    (f"{DIT} --init IN/none", ["--init", "IN/none"]),
    (f"{DIT} --init AT/decoder.safetensors", ["--init", "decoder.safetensors"]),
    (f"{DIT} --init AT/model.safetensors --head-width 200 --head-depth 2",
     ["--head-width asks for 200", "--init"]),
    (f"{DIT} --init IN/size.safetensors", ["--init", "size.safetensors", "160", "96"]),
    (f"{DECODER} --init AT/encoder.safetensors", ["--init", "encoder.safetensors", "not a decoder"]),
    (f"{DECODER} --gram 1 --vgg IN/none.safetensors", ["--vgg", "none.safetensors"]),
    (f"{DECODER} --lpips 1 --vgg IN/wide.safetensors", ["--lpips-weights", "vgg.pth"]),
    (f"{DECODER} --lpips 1 --vgg AT/encoder.safetensors", ["--vgg", "features.0.weight"]),
    (f"{DECODER} --gan 1 --dino AT/encoder.safetensors", ["--dino", "encoder.safetensors"]),
    (f"{DECODER} --size b --encoder AT/encoder.safetensors",
     ["--vgg", "--lpips-weights", "--dino", "weights/"]),
    (f"{ENCODER} --tokenizer IN/empty", ["no tokenizer", "IN/empty"]),
    (f"{ENCODER} --out IN/oldtok", ["IN/oldtok", "tokenizer.json"]),
    (f"{ENCODER} --tokenizer IN/empty --out IN/oldtok", ["no tokenizer", "IN/empty"]),
    (f"{ENCODER} --init IN/none --tokenizer AT/", ["--init", "IN/none"]),
    (f"{ENCODER} --init AT/decoder.safetensors --tokenizer AT/", ["--init", "decoder.safetensors"]),
    # data
    (f"{DIT} --data builtin:nope", ["--data builtin:nope", "builtin:web"]),
    (f"{DIT} --data builtin:web=0", ["--data builtin:web=0", "positive"]),
    (f"{DIT} --data builtin:web=-1", ["--data builtin:web=-1", "positive"]),
    (f"{DIT} --data builtin:web=x", ["--data builtin:web=x", "positive"]),
    (f"{DIT} --data builtin:web builtin:text=1e-6", ["--data builtin:text", "1/1000"]),
    (f"{DIT} --data IN/none", ["--data", "IN/none"]),
    (f"{DIT} --data ''", ["--data", "empty"]),
    (f"{DIT} --encoder ''", ["--encoder", "empty"]),
    (f"{DIT} --stepz 5", ["--stepz"]),
    (f"{DIT} --predict eps", ["--predict", "'eps'"]),
    (f"{DIT} --init AT/ --width 128", ["--width asks for 128", "160"]),
    (f"{DIT} --init AT/ --size 2b", ["--size", "--init"]),
    (f"{DIT} --heads 7", ["160", "4 x heads"]),
    (f"{DIT} --data IN/empty", ["--data", "IN/empty", "0 images"]),
    (f"{DIT} --data IN/plain", ["--data", "IN/plain", "3 images", "caption"]),
    (f"{DIT} --data IN/plain/a.png", ["--data", "a.png", "no known kind"]),
    (f"{DIT} --data IN/folder.jsonl", ["--data", "folder.jsonl"]),
    (f"{DIT} --data IN/list.jsonl", ["--data", "list.jsonl:1", "expected a JSON object"]),
    (f"{DIT} --data IN/noimage.jsonl", ["--data", "noimage.jsonl:1", 'expected "image"']),
    (f"{DIT} --data IN/nothing.jsonl", ["--data", "nothing.jsonl", "0 records"]),
    (f"{DIT} --data IN/lost.jsonl", ["--data", "lost.jsonl", "no such file"]),
    (f"{DIT} --data IN/binary.jsonl", ["--data", "binary.jsonl:", "broken records"]),
    (f"{DIT} --data IN/odd.jsonl", ["--data", "odd.jsonl", "broken records"]),
    (f"{DIT} --data IN/captions.jsonl", ["--data", "captions.jsonl", "is a list, not a string"]),
    (f"{DIT} --data IN/surrogate.jsonl", ["--data", "surrogate.jsonl", "surrogates not allowed"]),
    (f"{DIT} --data IN/o*d*.jsonl", ["--data", "2 files", "source of its own"]),
    (f"{DIT} --data IN/meta", ["--data", "metadata.jsonl:1", "file_name"]),
    (f"{DIT} --data IN/metastring", ["--data", "metadata.jsonl:1", "expected a JSON object"]),
    (f"{DIT} --data IN/noise.tar", ["--data", "noise.tar", "invalid header"]),
    (f"{DIT} --data IN/cut.tar", ["--data", "cut.tar", "header"]),
    (f"{DIT} --data IN/texts.tar", ["--data", "texts.tar", "0 images"]),
    (f"{DIT} --data IN/noimages.tar", ["--data", "noimages.tar", "broken records"]),
    (f"{DIT} --data IN/{{000..002}}.tar", ["--data", "3 files of 3"]),
    (f"{DIT} --data IN/{{2..0}}.tar", ["--data", "{2..0}.tar"]),
    (f"{DIT} --data IN/*.tgz", ["--data", "*.tgz"]),
    (f"{DECODER} --data IN/noimages.tar", ["--data", "noimages.tar", "broken records"]),
    (f"{ENCODER} --data IN/plain --tokenizer AT/", ["--data", "IN/plain", "caption"]),
    ("data.py show builtin:wep", ["--data", "builtin:wep", "builtin:web"]),
    ("data.py show --count 1 --out s.psd", ["--out", "s.psd"]),
    ("data.py show --count 0", ["--count", "'0'"]),
    ("data.py show --count 1 --out IN/notes.txt/s.png", ["--out", "s.png"]),
    # the run folder
    (f"{DIT} --out IN/notes.txt", ["--out", "notes.txt"]),
    (f"{DIT} --out IN/notes.txt/run", ["--out", "notes.txt"]),
    (f"{DIT} --out IN/locked", ["--out", "locked"]),
    (f"{DIT} --out IN/clash --lr 0.5", ["IN/clash", "--lr: checkpoint 0.1, now 0.5",
                                        "--seed: checkpoint 7, now 0", "--fresh"]),
    (f"{DIT}", ["IN/run/checkpoints/step-0000002", "does not fit", "delete IN/run"]),
    (f"{DIT} --cond-drop 0 --guidance 3", ["--guidance 3", "--cond-drop 0"]),
    ("train_decoder.py --scan", ["--scan"]),
    ("train_decoder.py --latent vae --compile", ["--compile", "--latent vae"]),
    (f"{DIT} --keep 100000000", ["lower --keep", "100000000", "GB are free", "--out IN/run"]),
]


def load(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            file = path.with_name("member")
            file.write_bytes(content)
            tar.add(file, name)
            file.unlink()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Everything that can be wrong with a file, made once."""
    f = tmp_path_factory.mktemp("inputs")
    for name in ("empty", "plain", "folder.jsonl", "meta", "metastring", "good", "tars", "locked"):
        (f / name).mkdir()
    for name in ("plain/a.png", "plain/b.png", "plain/c.png", "folder.jsonl/a.png", "good/a.png"):
        Image.new("RGB", (20, 20), "red").save(f / name)
    png = (f / "plain/a.png").read_bytes()
    (f / "good/a.txt").write_text("a red square")
    (f / "notes.txt").write_text("nothing of use")
    (f / "list.jsonl").write_text('["plain/a.png", "x"]')
    (f / "noimage.jsonl").write_text('{"caption": "x"}')
    (f / "nothing.jsonl").write_text("\n\n")
    (f / "lost.jsonl").write_text('{"image": "gone.png", "caption": "x"}')
    (f / "binary.jsonl").write_bytes(bytes(range(256)))
    (f / "odd.jsonl").write_text('{"image": "plain/a.png", "conversations": "what?"}')
    (f / "old.jsonl").write_text('{"image": "plain/a.png", "caption": "x"}')
    (f / "captions.jsonl").write_text('{"image": "plain/a.png", "caption": ["a", "b"]}')
    (f / "surrogate.jsonl").write_text('{"image": "plain/a.png", "caption": "a \\ud83d"}')
    (f / "special.txt").write_text("a cat\na dog <|im_end|>")
    (f / "image.txt").write_text("a cat <image>")
    (f / "half.jsonl").write_text('{"prompt": "a \\ud83d"}')
    (f / "slow").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (f / "slow" / name).write_text("{}")
    (f / "meta/metadata.jsonl").write_text('{"file": "a.png", "text": "x"}')
    (f / "metastring/metadata.jsonl").write_text('"a.png"')
    (f / "noise.tar").write_bytes(random.Random(0).randbytes(4096))
    write_tar(f / "cut.tar", [("a.txt", b"x"), ("a.png", png + bytes(9000))])
    os.truncate(f / "cut.tar", 3000)
    write_tar(f / "texts.tar", [("a.txt", b"x"), ("b.txt", b"x")])
    write_tar(f / "noimages.tar", [(f"{k}.{e}", b"x") for k in range(9) for e in ("jpg", "txt")])
    (f / "tars/00000.tar").touch()
    (f / "locked/lock").mkdir()                         # as unwritable as it gets, even for root
    (f / "cut.safetensors").write_bytes((TINY / "encoder.safetensors").read_bytes()[:100_000])
    for file, out, key, value in (
            ("encoder", "shape", "vision_model.encoder.layers.0.layer_norm1.weight", torch.zeros(3, 5)),
            ("model", "size", "diff_head.model.x_embedder.proj.weight", torch.zeros(96, 96, 1, 1))):
        file = TINY / f"{file}.safetensors"
        with safe_open(file, "pt") as opened:
            assert key in opened.keys()
            save_file({**load_file(file), key: value}, f / f"{out}.safetensors", opened.metadata())
    wide = losses.Perceptual().state_dict()                         # torchvision's VGG16: no lin*
    save_file({k: v for k, v in wide.items() if not k.startswith("lin")}, f / "wide.safetensors")
    (f / "oldtok").mkdir()
    (f / "oldtok/tokenizer.json").write_text("{broken")
    (f / "oldtok/lock").touch()
    torch.save({"a": print}, f / "code.pt")
    for name, args in (("run", {}), ("clash", {"lr": 0.1, "seed": 7})):
        step = f / name / "checkpoints/step-0000002"
        step.mkdir(parents=True)
        (f / name / "samples").mkdir()
        (f / name / "lock").touch()
        (f / name / "args.json").write_text("{}")
        (f / name / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
        (step / "meta.json").write_text(json.dumps({"step": 2, "args": args}))
        save_file({"a": torch.zeros(3)}, step / "state.safetensors")
    return f


def test_contradictions_are_found_before_networks_are_made(inputs, monkeypatch, capsys):
    for script in (DIT, ENCODER):
        module = load(script)
        monkeypatch.setattr("parallel.build", None) if script == ENCODER else None
        monkeypatch.setattr(sys, "argv", [script, "--out", str(inputs / "clash"), "--lr", "0.5"])
        with pytest.raises(SystemExit):
            cli.main(module.main)
        assert "--lr: checkpoint 0.1, now 0.5" in capsys.readouterr().err


def listing(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("command, words", BAD, ids=[c for c, _ in BAD])
def test_bad_input(command, words, inputs, tmp_path, monkeypatch, capsys):
    """In a folder of its own, which stays empty, and with a run folder that holds a run."""
    if command.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("here CUDA is not bad input")
    if command.endswith("xla") and importlib.util.find_spec("torch_xla"):
        pytest.skip("here XLA is not bad input")
    if "--wandb" in command and importlib.util.find_spec("wandb"):
        pytest.skip("here W&B is not bad input")
    put = lambda s: s.replace("IN/", f"{inputs}/").replace("AT/", f"{TINY}/")
    if not command.startswith("data.py") and "--out" not in command:
        command += " --out IN/run"
    script, *argv = map(put, shlex.split(command))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    before, handlers = listing(inputs), {s: signal.getsignal(s) for s in (signal.SIGTERM,
                                                                         signal.SIGINT)}
    with pytest.raises(SystemExit) as stopped:
        cli.main(load(script).main)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error:") == 1, said
    said = said.partition("error:")[2]                  # argparse's usage before it has all flags
    for word in map(put, words):
        assert any(w in said for w in word.split("|")), (word, said)
    assert not list(tmp_path.iterdir()) and listing(inputs) == before
