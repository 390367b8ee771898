"""Stopped anywhere and started again by the same command, a run ends with the same bytes.

    pytest -m "" tests/test_resume.py               # with the exhaustive parts
    RESUME_SEED=7 pytest -s tests/test_resume.py    # other moments; they are printed
"""
import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data                                                             # noqa: E402
import parallel                                                         # noqa: E402
import run as runs                                                      # noqa: E402

SEED = int(os.environ.get("RESUME_SEED", 0))
CPU = parallel.Devices("cpu", torch.device("cpu"), 0, 1, torch.float32, {"fsdp": 1, "tensor": 1})

# ------------------------------------------------------------------------------------------------
# Runs as processes of their own, forked from one that has imported everything: 1 s instead of 8
# ------------------------------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_dit", "train_decoder", "train_encoder", "torch._dynamo",
                               "matplotlib.pyplot"])
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "save_file"}
STEPS = ["--device", "cpu", "--dtype", "float32", "--steps", "4", "--batch", "4", "--micro-batch",
         "2", "--workers", "2", "--log-every", "1", "--save-every", "1", "--sample-every", "99"]


def child(command, out, at, how):
    """`python COMMAND --out OUT`. Before its first operation on files of OUT that begins with `at`,
    `how` comes: a signal to its group, or "full". (A weight file, which is written outside of
    Python, is written and cut in half first.) The operations are listed in OUT.operations."""
    os.setsid()                                         # a group of its own, as a shell gives it
    said = os.open(f"{out}.said", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(said, 1), os.dup2(said, 2)
    listing, write, come = open(f"{out}.operations", "w", buffering=1), runs.save_file, False

    def happens(name, args):
        nonlocal come
        path = str(args[0]) if args else ""
        # what shutil.rmtree deletes is named relative to its folder
        ours = path.startswith(f"{out}/") or (
            name in ("os.rmdir", "os.remove") and not path.startswith("/"))
        if name in OPERATIONS and ours:
            line = f"{name} {path.removeprefix(f'{out}/')}"
            listing.write(line + "\n")
            if how == "full" and come and name == "os.rmdir":           # the failed save is gone
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            if not come and at and line.startswith(at):
                come = True
                if how == "full":                       # no file can grow beyond 200 kB
                    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
                elif name != "save_file":
                    os.killpg(0, how)

    def cut(tensors, path, **options):
        sys.audit("save_file", str(path))
        write(tensors, path, **options)
        if come and at == f"save_file {str(path).removeprefix(f'{out}/')}":
            os.truncate(path, os.path.getsize(path) // 2)
            os.killpg(0, how)
    runs.save_file = cut
    sys.addaudithook(happens)
    script, *sys.argv[1:] = [*command, "--out", str(out)]
    sys.argv[0] = script
    runs.main(importlib.import_module(script.removesuffix(".py")).main)


def start(command, out, at="", how=signal.SIGKILL):
    out.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as m:             # for the server, at the first call
        m.setenv("PYTHONPATH", str(ROOT))
        m.setenv("OMP_NUM_THREADS", "1")
        process = SERVER.Process(target=child, args=([*map(str, command)], out, at, how))
        process.start()
    return process


def ends(command, out, at="", how=signal.SIGKILL):
    """Wait for a run -> its exit status, or minus the signal."""
    process = start(command, out, at, how)
    process.join()
    return process.exitcode


def said(out):
    return Path(f"{out}.said").read_text()


def names(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def kill(process, whole_group):
    try:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass                                            # it was done already
    process.join()


SCORES = "psnr", "background_right", "colour_right", "retrieval", "probe_psnr", "effective_rank"


def same(out, whole, but=()):
    """Weights, averages, and the log without its timings, and without the keys in `but`."""
    files = sorted(p.name for p in (whole / "final").iterdir())
    assert sorted(p.name for p in (out / "final").iterdir()) == files
    for name in files:
        assert (out / "final" / name).read_bytes() == (whole / "final" / name).read_bytes(), name
    timings = {"images_per_s", "tflops", "mfu", "memory_gb", "data_wait_s", "step_s",
               *but}
    logs = [[{k: v for k, v in json.loads(line).items() if k not in timings}
             for line in (d / "log.jsonl").read_text().splitlines()] for d in (out, whole)]
    assert logs[0] == logs[1]
    assert names(out) == names(whole) == ["step-0000003", "step-0000004"]


@pytest.fixture(scope="module")
def commands(nets, tmp_path_factory):
    """name -> the command of a short run with all that could be forgotten in a checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    shards = folder / "shards"
    shards.mkdir()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["data.py", "export", "--source", "builtin:web", "--count", "40",
                                "--resolution", "64", "--shard", "20", "--out", str(shards)])
        data.main()
    tar = shards / "00000.tar"
    png = tar.read_bytes().split(b"IHDR")               # the second picture is broken, and counted
    tar.write_bytes(b"IHDR".join(png[:2]) + b"XXXX" + b"IHDR".join(png[2:]))
    mixture = ["--data", "builtin:synthetic=2", f"{shards}=2", "builtin:hq"]
    terms = ["--lpips", "1", "--gram", "100", "--gan", "0.5", "--disc-start", "1", "--gan-start",
             "2"]
    return {
        "dit": ["train_dit.py", *STEPS, *mixture, "builtin:qa", "--sample-steps", "1", "--guidance",
                "1"],
        "decoder": ["train_decoder.py", *STEPS, *mixture, *nets, *terms, "--noise-tau", "0.2",
                    "--latent-stats", "auto", "--stats-images", "4"],
        "vae": ["train_decoder.py", *STEPS, *mixture, *nets, *terms, "--latent", "vae"],
        "encoder": ["train_encoder.py", *STEPS, *mixture, "--width", "48", "--depth", "2",
                    "--tokenizer", ROOT / "assets/tiny"]}


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """name -> (an uninterrupted run, its operations on files, how long it took)."""
    done = {}

    def get(name):
        if name not in done:
            out, begin = tmp_path_factory.mktemp(name) / "whole", time.monotonic()
            assert ends(commands[name], out) == 0, said(out)
            seconds = time.monotonic() - begin
            done[name] = out, Path(f"{out}.operations").read_text().splitlines(), seconds
        return done[name]
    return get


SCRIPTS = ["dit", "decoder", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vae", "encoder"))]

# ------------------------------------------------------------------------------------------------
# kill -9
# ------------------------------------------------------------------------------------------------


def part(operations, first, last=None):
    """The operations from that which begins with `first` up to that which begins with `last`."""
    find = lambda s: next(k for k, line in enumerate(operations) if line.startswith(s))
    words = "os.rmdir", "os.remove", "checkpoints", "final"
    return [line for line in operations[find(first):last and find(last)]
            if any(w in line for w in words)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_again_and_again(name, commands, whole, tmp_path):
    """Inside its second save, inside its third, twice at a random moment (with the loader's workers
    and without them), inside final/; then to the end."""
    original, operations, seconds = whole(name)
    rand, out = random.Random(f"{SEED} {name}"), tmp_path / "run"

    def inside(*span):
        where = rand.choice(part(operations, *span))
        assert ends(commands[name], out, where) == -signal.SIGKILL, said(out)
        print(f"{name}: killed before {where!r}, checkpoints {names(out)}")
    inside("os.mkdir checkpoints/.writing-2", "os.mkdir checkpoints/.writing-3")
    inside("os.mkdir checkpoints/.writing-3", "os.mkdir checkpoints/.writing-4")
    for group in (True, False):
        moment, process = rand.uniform(0.1, 0.7) * seconds, start(commands[name], out)
        process.join(moment)
        kill(process, group)
        print(f"{name}: killed after {moment:.2f} s, checkpoints {names(out)}")
    inside("os.mkdir final")
    assert ends(commands[name], out) == 0, said(out)
    same(out, original)
    assert '"skipped_records": 1' in (out / "log.jsonl").read_text().splitlines()[-1]
    with pytest.raises(ProcessLookupError):             # workers whose trainer was killed alone
        for _ in range(600):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.slow
def test_killed_at_every_operation_of_a_save_and_of_the_export(commands, whole, tmp_path):
    original, operations, _ = whole("dit")
    base, first = tmp_path / "base", "os.mkdir checkpoints/.writing-4"
    assert ends(commands["dit"], base, first) == -signal.SIGKILL
    for k, where in enumerate(dict.fromkeys(part(operations, first))):
        out = tmp_path / f"run{k}"
        shutil.copytree(base, out)
        assert ends(commands["dit"], out, where) == -signal.SIGKILL, (where, said(out))
        assert ends(commands["dit"], out) == 0, (where, said(out))
        same(out, original)
        shutil.rmtree(out)
    assert k > 15


# ------------------------------------------------------------------------------------------------
# Asked to stop, no room left, started twice
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, how", [("dit", signal.SIGINT), ("decoder", signal.SIGTERM),
                                       pytest.param("encoder", signal.SIGTERM,
                                                    marks=pytest.mark.slow)])
def test_asked_to_stop(name, how, commands, whole, tmp_path):
    """The signal goes to the loader's workers too, as from a terminal or a scheduler."""
    original, _, _ = whole(name)
    out = tmp_path / "run"
    assert ends(commands[name], out, "open checkpoints/.writing-2", how) == 0
    assert "stopped and saved at step 3; the same command again goes on from there" in said(out)
    assert "Traceback" not in said(out) and not (out / "final").exists()
    assert names(out) == ["step-0000002", "step-0000003"]
    assert ends([*commands[name], "--workers", "0"], out) == 0      # one that may change
    assert f"resumed {out} at step 3" in said(out)
    same(out, original, but=SCORES)                     # of the samples that are drawn at a stop


def test_full_disk(commands, whole, tmp_path):
    """A save that does not fit is said, the older checkpoint stays, and the run goes on."""
    original, _, _ = whole("dit")
    out = tmp_path / "run"
    assert ends(commands["dit"], out, "os.mkdir checkpoints/.writing-3", "full") == 0, said(out)
    line = next(s for s in said(out).splitlines() if "could not save step 3" in s)
    assert "File too large" in line and "the checkpoint before it is kept" in line
    assert names(out) == ["step-0000002", "step-0000004"]
    for name in ("model", "ema"):
        file = f"final/{name}.safetensors"
        assert (out / file).read_bytes() == (original / file).read_bytes()


def test_full_disk_at_the_end(commands, whole, tmp_path):
    """One line, and the same command writes final/ later."""
    original, _, _ = whole("dit")
    out = tmp_path / "run"
    assert ends(commands["dit"], out, "os.mkdir final", "full") == 2, said(out)
    assert f"error: cannot write {out}/final/model.safetensors" in said(out)
    assert "Traceback" not in said(out)
    assert ends(commands["dit"], out) == 0, said(out)
    same(out, original)


def listing(folder):
    """path -> (time of the last change, bytes) of all that is in a folder."""
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")
            if p.name not in ("lock", "run")}


def test_second_process_refuses(commands, tmp_path, restore_signals):
    out = tmp_path / "run"
    first = runs.Run(arguments(out), CPU)
    first.load(tensors(0))
    before = listing(out)
    assert ends(commands["dit"], out) == 2
    assert f"--out {out} is in use by another process" in said(out) and listing(out) == before
    first.lock.close()


# ------------------------------------------------------------------------------------------------
# Checkpoints alone
# ------------------------------------------------------------------------------------------------

def arguments(out, **other):
    return argparse.Namespace(**{**dict(out=out, fresh=False, init=None, wandb=None, bench=None, keep=2, lr=1e-3, steps=9,
                                        log_every=1), **other})


@pytest.fixture
def restore_signals():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def tensors(value):
    return {"a": torch.full((3, 2), float(value)), "ema.a": torch.full((3, 2), value / 2)}


def test_a_result_without_checkpoints_is_not_replaced(saved, monkeypatch):
    """Who deletes checkpoints to save room keeps final/; who moves a run aside, what it begins from."""
    (saved / "final").mkdir()
    shutil.rmtree(saved / "checkpoints")
    with pytest.raises(parallel.UserError, match="holds final/ and no checkpoint.*--fresh"):
        runs.Run(arguments(saved), CPU)
    for init in (saved, saved / "final"):
        with pytest.raises(parallel.UserError, match=f"--init {init} is in --out"):
            runs.Run(arguments(saved, fresh=True, init=init), CPU)
    runs.Run(arguments(saved, fresh=True, init=saved.with_name("other")), CPU)
    monkeypatch.chdir(saved / "samples")
    for out in (Path("."), Path(".."), saved):
        with pytest.raises(parallel.UserError, match="would move the working folder"):
            runs.Run(arguments(out, fresh=True), CPU)


@pytest.fixture
def saved(tmp_path, restore_signals):
    """A run that has saved steps 1 to 5 and was left."""
    run = runs.Run(arguments(tmp_path / "run"), CPU)
    run.load(tensors(0))
    for step in range(1, 6):
        run.save(step, tensors(step))
    run.lock.close()
    return run.dir


def load(out, **other):
    found = tensors(0)
    run = runs.Run(arguments(out, **other), CPU)
    run.load(found)
    run.lock.close()
    return run.start, found["a"][0, 0].item(), found["ema.a"][0, 0].item()


def test_the_last_are_kept(saved):
    assert names(saved) == ["step-0000004", "step-0000005"] and load(saved) == (5, 5, 2.5)
    mine = saved / "checkpoints/step-0000004 of mine"
    mine.mkdir()
    (mine / "meta.json").touch()
    run = runs.Run(arguments(saved, keep=1), CPU)
    run.load(tensors(0))
    run.save(12345678, tensors(12))                     # more digits than the names have
    assert names(saved) == ["step-0000004 of mine", "step-12345678"]
    run.lock.close()
    assert load(saved) == (12345678, 12, 6)


def test_what_was_cut_is_never_chosen(saved):
    """Neither a save nor a deletion; and both are cleared away."""
    folder = saved / "checkpoints"
    shutil.copytree(folder / "step-0000005", folder / ".writing-7")
    shutil.copytree(folder / "step-0000005", folder / "step-0000003")
    (folder / "step-0000003/meta.json").unlink()
    assert load(saved) == (5, 5, 2.5)
    run = runs.Run(arguments(saved), CPU)
    run.load(tensors(0))
    run.save(6, tensors(6))
    assert names(saved) == ["step-0000005", "step-0000006"]
    run.lock.close()


@pytest.mark.parametrize("what, size, words", [
    ("state.safetensors", 40, "damaged"), ("state.safetensors", 0, "damaged"),
    ("state.safetensors", 190, "damaged"), ("state.safetensors", None, "2 missing (first: a)"),
    ("meta.json", 20, "meta.json"), ("meta.json", 0, "meta.json")])
def test_damaged_newest_checkpoint(what, size, words, saved):
    """Told, with what to do; nothing is written; done as told, it goes on from the one before."""
    newest = saved / "checkpoints/step-0000005"
    if size is None:
        (newest / what).unlink()
    else:
        assert size < (newest / what).stat().st_size
        os.truncate(newest / what, size)
    before = listing(saved)
    with pytest.raises(parallel.UserError) as error:
        load(saved)
    assert f"checkpoint {newest}" in str(error.value) and words in str(error.value)
    assert "delete it to go on from" in str(error.value) and "\n" not in str(error.value)
    assert listing(saved) == before
    shutil.rmtree(newest)
    assert load(saved) == (4, 4, 2)


def test_contradicting_arguments(saved):
    """All that differ, both values; nothing is written."""
    before = listing(saved)
    with pytest.raises(parallel.UserError) as error:
        load(saved, lr=0.5, steps=10)
    for words in ("--lr: checkpoint 0.001, now 0.5", "--steps: checkpoint 9, now 10", "--fresh"):
        assert words in str(error.value)
    assert listing(saved) == before
    assert load(saved, log_every=7) == (5, 5, 2.5)      # one that changes nothing
    other = parallel.Devices("cpu", CPU.device, 0, 1, torch.bfloat16, {"fsdp": 1, "tensor": 1})
    with pytest.raises(parallel.UserError, match="--dtype: checkpoint 'float32', now 'bfloat16'"):
        runs.Run(arguments(saved), other)               # nobody gave it, another machine took it


def test_fresh_moves_the_old_run_aside(saved):
    assert load(saved, fresh=True, lr=0.5) == (0, 0, 0)
    assert load(saved.with_name("run.old1")) == (5, 5, 2.5)


def test_no_room_for_checkpoints(saved, monkeypatch):
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    before = listing(saved)
    with pytest.raises(parallel.UserError, match="--keep"):
        load(saved, keep=50)
    assert listing(saved) == before
