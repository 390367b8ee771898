"""A run that is stopped anywhere and started again by the same command ends with the same bytes.

    pytest -m "" tests/test_resume.py               # with the exhaustive parts
    RESUME_SEED=7 pytest -s tests/test_resume.py    # other moments; they are printed
"""
import argparse
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint                                                       # noqa: E402
import cli                                                              # noqa: E402
import data                                                             # noqa: E402
import parallel                                                         # noqa: E402
import runfiles                                                           # noqa: E402
from checkpoint import Run                                              # noqa: E402
from cli import UserError                                               # noqa: E402
from tiny import world                                                  # noqa: E402

SEED = int(os.environ.get("RESUME_SEED", 0))
CPU = parallel.setup("cpu", "float32")

# ------------------------------------------------------------------------------------------------
# Runs as processes of their own, forked from one that has imported everything: 1 s instead of 8
# ------------------------------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_dit", "train_decoder", "tiny.train_encoder",
                               "torch._dynamo", "matplotlib.pyplot"])
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "save_file"}
STEPS = ["--device", "cpu", "--dtype", "float32", "--steps", "4", "--batch", "4", "--micro-batch",
         "2", "--workers", "2", "--log-every", "1", "--save-every", "1", "--sample-every", "99"]


def child(command, out, at, how):
    """Run `python COMMAND --out OUT`. Before its first operation on files of OUT that begins with
    `at`, `how` happens: a signal to its group; "full": no file can grow; "gone": checkpoints/ is a
    file. (A weight file, which is written outside of Python, is written and cut in half first.) The
    operations are listed in OUT.operations."""
    os.setsid()                                         # a group of its own, as a shell gives it
    said = os.open(f"{out}.said", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(said, 1), os.dup2(said, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listing, write, come = open(f"{out}.operations", "w", buffering=1), runfiles.save_file, False

    def happens(name, args):
        nonlocal come
        path = str(args[0]) if args else ""
        # what shutil.rmtree deletes is named relative to its folder
        ours = path.startswith(f"{out}/") or (
            name in ("os.rmdir", "os.remove") and not path.startswith("/"))
        if name not in OPERATIONS or not ours:
            return
        line = f"{name} {path.removeprefix(f'{out}/')}"
        listing.write(line + "\n")
        if how == "full" and come and name == "os.rmdir":       # the failed save is deleted
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        if come or not at or not line.startswith(at):
            return
        come = True
        if how == "full":                                       # no file can grow beyond 200 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        elif how == "gone":
            (out / "checkpoints").rename(out / "away")
            (out / "checkpoints").touch()
        elif name != "save_file":
            os.killpg(0, how)

    def cut(tensors, path, *rest):
        sys.audit("save_file", str(path))
        write(tensors, path, *rest)
        if come and at == f"save_file {str(path).removeprefix(f'{out}/')}":
            os.truncate(path, os.path.getsize(path) // 2)
            os.killpg(0, how)
    runfiles.save_file = cut
    sys.addaudithook(happens)
    script, *sys.argv[1:] = [*command, "--out", str(out)]
    sys.argv[0] = script
    cli.main(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)


def start(command, out, at="", how=signal.SIGKILL):
    out.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as m:             # for the server, at the first call
        m.setenv("PYTHONPATH", str(ROOT))
        m.setenv("OMP_NUM_THREADS", "1")
        process = SERVER.Process(target=child, args=([*map(str, command)], out, at, how))
        process.start()
    return process


def ends(command, out, at="", how=signal.SIGKILL):
    """Run a command to its end -> its exit status, or minus the signal."""
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
    """Compare weights, averages, and the log without its timings and the keys in `but`."""
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
    assert not list(out.glob(".*"))                     # nothing half written is left


def write_shard(path, count):
    """Write a tar shard of toy images with captions, of which only every fourth is intact."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            record, png = world.builtin_record("builtin:web", 0, i, 64), io.BytesIO()
            Image.fromarray(record["image"]).save(png, "PNG")
            image = b"broken" if i % 4 else png.getvalue()
            for name, content in ((f"{i:03d}.png", image), (f"{i:03d}.txt", record["caption"].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def commands(nets, tmp_path_factory):
    """name -> the command of a short run with everything that a checkpoint could forget."""
    shards = tmp_path_factory.mktemp("shards")
    for k in range(2):
        # 4 of 13 are intact, so the 5 that a run reads meet a broken one in whatever order (which
        # the folder's name decides); 10 broken ones would still be few enough to go on
        write_shard(shards / f"{k:05d}.tar", 8 if k == 0 else 5)
    mixture = ["--data", "builtin:synthetic=2", f"{shards}=2", "builtin:hq"]
    terms = ["--lpips", "1", "--gram", "100", "--gan", "0.5", "--disc-start", "1", "--gan-start",
             "2"]
    return {
        "dit": ["train_dit.py", *STEPS, *mixture, "builtin:qa", "--sample-steps", "1", "--guidance",
                "1"],
        "decoder": ["train_decoder.py", *STEPS, *mixture, *nets, *terms, "--noise-tau", "0.2"],
        "vae": ["train_decoder.py", *STEPS, *mixture, *nets, *terms, "--latent", "vae"],
        "encoder": ["tiny/train_encoder.py", *STEPS, *mixture, "--width", "48", "--depth", "2",
                    "--tokenizer", ROOT / "tiny"]}


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """name -> an uninterrupted run, its operations on files, and its seconds."""
    done = {}

    def get(name):
        if name not in done:
            out, begin = tmp_path_factory.mktemp(name) / "whole", time.monotonic()
            assert ends(commands[name], out) == 0, said(out)
            seconds = time.monotonic() - begin
            done[name] = out, Path(f"{out}.operations").read_text().splitlines(), seconds
        return done[name]
    return get


SCRIPTS = ["dit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("decoder", "vae", "encoder"))]

# ------------------------------------------------------------------------------------------------
# kill -9
# ------------------------------------------------------------------------------------------------


def part(operations, first, last=None):
    """Return the operations from the one that begins with `first` to the one with `last`."""
    find = lambda s: next(k for k, line in enumerate(operations) if line.startswith(s))
    words = "os.rmdir", "os.remove", "checkpoints", "final/", "-final"
    return [line for line in operations[find(first):last and find(last)]
            if any(w in line for w in words)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_again_and_again(name, commands, whole, tmp_path):
    """Kill a run inside its second save, inside its third, twice at a random moment (with the
    loader's workers and without them), while it writes final/; then let it end."""
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
    inside("os.mkdir .writing-final")
    assert ends(commands[name], out) == 0, said(out)
    same(out, original)
    assert log_lines(out)[-1]["skipped_records"] > 0
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

@pytest.mark.parametrize("name, how", [("dit", signal.SIGINT),
                                       pytest.param("decoder", signal.SIGTERM,
                                                    marks=pytest.mark.slow),
                                       pytest.param("encoder", signal.SIGTERM,
                                                    marks=pytest.mark.slow)])
def test_asked_to_stop(name, how, commands, whole, tmp_path):
    """The signal reaches the loader's workers too, as from a terminal or a scheduler. The run saves
    and ends by that signal, so that a shell loop around it stops."""
    original, _, _ = whole(name)
    out = tmp_path / "run"
    assert ends(commands[name], out, "os.mkdir checkpoints/.writing-2", how) == -how
    assert "stopped and saved at step 3; the same command again goes on from there" in said(out)
    assert "Traceback" not in said(out) and not (out / "final").exists()
    assert names(out) == ["step-0000002", "step-0000003"]
    assert ends([*commands[name], "--workers", "0"], out) == 0      # one that may change
    assert f"resumed {out} at step 3" in said(out)
    same(out, original, but=SCORES)                     # a stop draws samples too


def test_full_disk(commands, whole, tmp_path):
    """A save that does not fit is reported, the older checkpoint stays, and the run goes on."""
    original, _, _ = whole("dit")
    out = tmp_path / "run"
    assert ends(commands["dit"], out, "os.mkdir checkpoints/.writing-3", "full") == 0, said(out)
    line = next(s for s in said(out).splitlines() if "could not save step 3" in s)
    assert "File too large" in line and "older ones are kept" in line
    assert names(out) == ["step-0000002", "step-0000004"]
    for name in ("model", "ema"):
        file = f"final/{name}.safetensors"
        assert (out / file).read_bytes() == (original / file).read_bytes()


@pytest.mark.slow
def test_full_disk_at_the_end(commands, whole, tmp_path):
    """One line, and the same command writes final/ later."""
    original, _, _ = whole("dit")
    out = tmp_path / "run"
    assert ends(commands["dit"], out, "os.mkdir .writing-final", "full") == 2, said(out)
    assert f"error: cannot write {out}/final" in said(out) and not (out / "final").exists()
    assert "Traceback" not in said(out)
    assert ends(commands["dit"], out) == 0, said(out)
    same(out, original)


def test_every_save_fails(commands, tmp_path):
    """The run says so at each save, goes on and ends; no process is left."""
    out = tmp_path / "run"
    process = start(commands["dit"], out, "os.mkdir checkpoints/.writing-2", "gone")
    process.join(120)
    assert process.exitcode == 0, said(out)
    assert [f"could not save step {k}" in said(out) for k in (1, 2, 3, 4)] == [False] + [True] * 3
    assert "Traceback" not in said(out) and (out / "final/model.safetensors").is_file()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_killed_worker(commands, tmp_path):
    """The steps since the last checkpoint are saved; one line and no traceback. The same command
    goes on."""
    out = tmp_path / "run"
    command = [*commands["dit"], "--steps", "500", "--save-every", "500"]
    process, log = start(command, out), out / "log.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.join(120)
    assert process.exitcode == 2 and "Traceback" not in said(out), said(out)
    assert said(out).count("error: a loader worker died") == 1 and "--workers" in said(out)
    (saved,) = names(out)
    assert int(saved[5:]) == json.loads(log.read_text().splitlines()[-1])["step"]


@pytest.mark.parametrize("key", ["dit.dit_blocks.0.attn.qkv.weight",
                                 "ema.llm.model.norm.weight"])
def test_a_nan_in_a_checkpoint_is_refused(key, commands, whole, tmp_path):
    """In the weights or in the average: an error that names the tensor, and no final/."""
    out, (original, _, _) = tmp_path / "run", whole("dit")
    shutil.copytree(original, out, ignore=shutil.ignore_patterns("final", "step-0000004"))
    file = out / "checkpoints/step-0000003/state.safetensors"
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    state = load_file(file)
    state[key].view(-1)[0] = float("nan")
    meta["crc32"] = "{}"                                # as if the run itself had written it
    save_file(state, file, meta)
    assert ends(commands["dit"], out) == 2
    assert f"{key} holds NaN or infinity; " in said(out) and f"delete {file.parent}" in said(out)
    assert "Traceback" not in said(out) and not (out / "final").exists()


def test_flipped_bits_in_a_checkpoint_are_found(commands, whole, tmp_path):
    out, (original, _, _) = tmp_path / "run", whole("dit")
    shutil.copytree(original, out, ignore=shutil.ignore_patterns("final", "step-0000004"))
    file = out / "checkpoints/step-0000003/state.safetensors"
    with open(file, "r+b") as f:
        f.seek(-1000, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-1000, os.SEEK_END)
        f.write(bytes([byte ^ 1]))
    assert ends(commands["dit"], out) == 2
    assert "does not match its checksum" in said(out) and "Traceback" not in said(out)


def listing(folder):
    """Return {path: (time of the last change, bytes)} of everything in a folder."""
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")
            if p.name not in ("lock", "run")}


def test_second_process_refuses(commands, tmp_path, restore_signals):
    out = tmp_path / "run"
    first = opened(out)
    before = listing(out)
    assert ends(commands["dit"], out) == 2
    assert f"--out {out} is in use by another process" in said(out) and listing(out) == before
    first.lock.close()


# ------------------------------------------------------------------------------------------------
# The run folder alone
# ------------------------------------------------------------------------------------------------

def arguments(out, **other):
    values = dict(out=out, fresh=False, init=None, wandb=None, bench=None, keep=2, lr=1e-3, steps=9,
                  log_every=1)
    return argparse.Namespace(**{**values, **other})


@pytest.fixture
def restore_signals():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def tensors(value):
    return {"a": torch.full((3, 2), float(value)), "ema.a": torch.full((3, 2), value / 2)}


def opened(out, value=0, **other):
    run = Run(arguments(out, **other), CPU)
    run.load(tensors(value))
    return run


def save(run, step):
    run.done = step
    run.tensors = tensors(step)
    run.save()


@pytest.fixture
def saved(tmp_path, restore_signals):
    """A run that saved steps 1 to 5 and was left."""
    run = opened(tmp_path / "run")
    for step in range(1, 6):
        save(run, step)
    run.lock.close()
    return run.dir


def load(out, **other):
    found = tensors(0)
    run = Run(arguments(out, **other), CPU)
    run.load(found)
    run.lock.close()
    return run.start, found["a"][0, 0].item(), found["ema.a"][0, 0].item()


class Adapting(torch.optim.SGD):
    """Keeps a rate and a switch in its group, as Prodigy and schedule-free optimizers do, and a sum
    in bf16."""

    def step(self):
        super().step()
        for group in self.param_groups:
            group["lr"] *= 2 if group.get("warm") else 1
            group["warm"] = True
            for p in group["params"]:
                total = torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False)
                self.state[p].setdefault("total", total).add_(p.grad)
                p.data -= 0.1 * self.state[p]["total"]


OPTIMIZERS = {**{name: getattr(torch.optim, name) for name in
                 ("Adafactor", "Adam", "AdamW", "Muon", "NAdam", "SGD")}, "Adapting": Adapting}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on(kind, tmp_path, restore_signals):
    """Two steps and two more are the four of one process. Adafactor's state has its own shapes."""
    def train(out, steps):
        w = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = OPTIMIZERS[kind]([w], lr=0.1, **options)
        run = Run(arguments(out), CPU)
        run.load({"w": w}, [optimizer])
        for step in range(run.start, steps):
            w.grad = torch.cos(step + w.detach())
            optimizer.step()
        run.done = steps
        run.save()
        run.lock.close()
        return w.detach(), [v for _, v in sorted(optimizer.state[w].items())]

    train(tmp_path / "a", 2)
    (w, state), (w4, state4) = train(tmp_path / "a", 4), train(tmp_path / "b", 4)
    assert torch.equal(w, w4) and all(map(torch.equal, state, state4))


def test_a_fork_s_dropout_goes_on(tmp_path, restore_signals):
    """torch's draws in a step depend on seed and step alone."""
    def draws(start, seed=0):
        run = Run(arguments(tmp_path / "run", seed=seed, bench=9), CPU)
        run.start = start
        return [torch.rand(2) for _ in run.steps()]

    whole = draws(0)
    assert all(map(torch.equal, whole[4:], draws(4))) and not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], draws(0, seed=1)[0])


def test_a_dead_worker_of_a_bench_saves_nothing(saved, restore_signals):
    """Also in the folder of a run, whose checkpoints stay."""
    def loader():
        raise data.WorkerDied("a loader worker died")
        yield
    before, run = listing(saved), Run(arguments(saved, bench=9, batch=1, micro_batch=1), CPU)
    with pytest.raises(data.WorkerDied):
        next(run.micro_batches(loader()))
    assert listing(saved) == before


@pytest.mark.parametrize("fresh, held", [(False, "config.json"), (True, "photo.jpg")])
def test_a_folder_of_other_files_is_no_run(fresh, held, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / held).write_text("mine")
    with pytest.raises(UserError, match=f"mine holds {held} and is not the folder of a run"):
        Run(arguments(tmp_path / "mine", fresh=fresh), CPU)
    (tmp_path / "mine/lock").touch()
    Run(arguments(tmp_path / "mine", fresh=fresh), CPU)


def test_what_a_resumption_may_change():
    """Nothing that changes what is computed."""
    assert checkpoint.FREE == {
        "out", "fresh", "workers", "device", "compile", "log_every", "sample_every", "save_every",
        "keep", "wandb", "dry_run", "bench", "json", "mesh", "sample_steps", "guidance", "decoder",
        "sample_prompts", "scan", "remat"}


def test_a_result_without_checkpoints_is_not_replaced(saved, monkeypatch):
    """If only the checkpoints were deleted, final/ is kept; --fresh does not move --init aside."""
    (saved / "final").mkdir()
    shutil.rmtree(saved / "checkpoints")
    with pytest.raises(UserError, match="holds final/ and no checkpoint.*--fresh"):
        Run(arguments(saved), CPU)
    aside = "would move aside the working folder or --init"
    for init in (saved, saved / "final"):
        with pytest.raises(UserError, match=aside):
            Run(arguments(saved, fresh=True, init=init), CPU)
    Run(arguments(saved, fresh=True, init=saved.with_name("other")), CPU)
    monkeypatch.chdir(saved / "samples")
    for out in (Path("."), Path(".."), saved):
        with pytest.raises(UserError, match=aside):
            Run(arguments(out, fresh=True), CPU)


def test_the_last_are_kept(saved):
    assert names(saved) == ["step-0000004", "step-0000005"] and load(saved) == (5, 5, 2.5)
    mine = saved / "checkpoints/step-0000004 of mine"
    mine.mkdir()
    (mine / "meta.json").touch()
    run = opened(saved, keep=1)
    save(run, 12345678)                                 # more digits than the names have
    assert names(saved) == ["step-0000004 of mine", "step-12345678"]
    run.lock.close()
    assert load(saved) == (12345678, 12345678, 6172839)


def test_incomplete_checkpoints_are_never_chosen(saved):
    """Neither a save nor a deletion that was cut; and both are cleared away."""
    folder = saved / "checkpoints"
    shutil.copytree(folder / "step-0000005", folder / ".writing-7")
    shutil.copytree(folder / "step-0000005", folder / "step-0000003")
    (folder / "step-0000003/meta.json").unlink()
    (saved / ".writing-final").mkdir()
    assert load(saved) == (5, 5, 2.5)
    run = opened(saved)
    save(run, 6)
    assert names(saved) == ["step-0000005", "step-0000006"]
    assert not (saved / ".writing-final").exists()
    run.lock.close()


@pytest.mark.parametrize("what, size, words", [
    ("state.safetensors", 40, "state.safetensors"), ("state.safetensors", 0, "state.safetensors"),
    ("state.safetensors", 190, "state.safetensors"), ("state.safetensors", None, "2 missing (first: a)"),
    ("meta.json", 20, "meta.json"), ("meta.json", 0, "meta.json")])
def test_damaged_newest_checkpoint(what, size, words, saved):
    """The error says what to do; nothing is written; after that the run goes on from the checkpoint
    before."""
    newest = saved / "checkpoints/step-0000005"
    if size is None:
        (newest / what).unlink()
    else:
        assert size < (newest / what).stat().st_size
        os.truncate(newest / what, size)
    before = listing(saved)
    with pytest.raises(UserError) as error:
        load(saved)
    assert f"checkpoint {newest}" in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)
    assert f"delete {newest} to go on from step-0000004" in str(error.value)
    assert listing(saved) == before
    shutil.rmtree(newest)
    assert load(saved) == (4, 4, 2)


def test_contradicting_arguments(saved):
    """The error lists every difference with both values; nothing is written."""
    before = listing(saved)
    with pytest.raises(UserError) as error:
        load(saved, lr=0.5, steps=10)
    for words in ("--lr: checkpoint 0.001, now 0.5", "--steps: checkpoint 9, now 10", "--fresh"):
        assert words in str(error.value)
    assert listing(saved) == before
    assert load(saved, log_every=7) == (5, 5, 2.5)      # one that changes nothing
    with pytest.raises(UserError, match="--dtype: checkpoint 'float32', now 'bfloat16'"):
        Run(arguments(saved), parallel.setup("cpu", "bfloat16"))    # another machine's default


def test_a_flag_that_the_checkpoint_does_not_know_is_named(saved, capsys):
    """By code that has a flag more, or a flag less."""
    Run(arguments(saved, huber=0.1, ranks=None), CPU)
    assert "only one of the two knows --huber 0.1\n" in capsys.readouterr().err
    Run(arguments(saved), CPU)
    assert not capsys.readouterr().err
    without = arguments(saved)
    del without.lr
    Run(without, CPU)
    assert "only one of the two knows --lr 0.001\n" in capsys.readouterr().err


def test_fresh_moves_the_old_run_aside(saved):
    assert load(saved, fresh=True, lr=0.5) == (0, 0, 0)
    assert load(saved.with_name("run.old1")) == (5, 5, 2.5)


def test_fresh_on_a_link_moves_the_folder_behind_it(saved):
    """The link stays a link, and the new run lies where it leads: on the disk that the user chose.
    """
    disk, link = saved.parent / "disk", saved.parent / "link"
    disk.mkdir()
    saved.rename(disk / "run")
    link.symlink_to(disk / "run")
    assert load(link, fresh=True) == (0, 0, 0)
    assert link.is_symlink() and link.resolve() == disk / "run"
    assert load(disk / "run.old1") == (5, 5, 2.5)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["disk", "link"]


def test_room_for_one_checkpoint_more_than_are_kept(tmp_path, monkeypatch):
    """--keep checkpoints and the one that is being written; the run's own old ones are counted."""
    values = {"a": torch.zeros(1000)}                               # 4000 bytes
    usage = shutil.disk_usage(tmp_path)
    for free in (12_000, 11_999):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        run = Run(arguments(tmp_path / f"run{free}", keep=2), CPU)
        if free < 12_000:
            with pytest.raises(UserError, match="lower --keep"):
                run.load(values)
        else:
            run.load(values)
        run.lock.close()


# ------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------

def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_goes_on_counting(saved):
    lines = [{"step": k, "skipped_updates": k + 1, "skipped_records": 5 * k} for k in (4, 5, 6)]
    (saved / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = opened(saved)
    assert (run.skipped, run.skips.count) == (6, 25)
    assert log_lines(saved) == lines[:2]                # the resumed run writes the third again
    run.lock.close()


def test_damaged_bytes_in_the_log_do_not_end_a_run(saved):
    """A line that a crash cut, a byte that is no UTF-8, a line that is no log line: dropped."""
    good = [b'{"step": 1, "loss": 2.0}', b'{"step": 3, "loss": 1.0}']
    (saved / "log.jsonl").write_bytes(b"\n".join(
        [good[0], b'{"step": 2, "lo\xff\xfes": 1.0}', b"7", b"\0\0\0", good[1], b'{"step": 4']))
    run = opened(saved)
    assert [line["step"] for line in log_lines(saved)] == [1, 3]
    runfiles.plot_log(saved, ["loss"])
    assert (saved / "loss.png").is_file()
    run.lock.close()
