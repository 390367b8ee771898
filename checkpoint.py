"""The run folder that all training scripts share: arguments, log, plot, checkpoints, resume.

    runs/dit-tiny/  args.json  log.jsonl  loss.png  samples/  checkpoints/step-0001000/  final/

A checkpoint is a folder of `state.safetensors` (model, EMA, both moments; of several processes one
each, with its rows) and `meta.json` (step and arguments). It is written under another name, synced
to disk and then renamed, so a save that is cut short never hides the one before. The data position,
the learning rates and every random draw are functions of (seed, step): no global generator is used,
so there is no state of one to save, and a resumed run repeats the uninterrupted one bit for bit.
"""
import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import parallel
from data import SkipCounter
from parallel import UserError
from weights import check_keys
from world import DataError

# Arguments that may differ between a run and its resumption: they do not change what is computed,
# or (device, compile, mesh, scan, remat) only its rounding.
FREE = {"out", "fresh", "workers", "device", "compile", "log_every", "sample_every", "save_every",
        "keep", "wandb", "dry_run", "bench", "json", "mesh", "sample_steps", "guidance", "decoder",
        "export", "scan", "remat"}


def main(function):
    """Run a script's main: bad input is one line on stderr and exit status 2, a full disk 1."""
    try:
        function()
        parallel.finish()
    except BaseException as error:
        end_workers()
        if isinstance(error, KeyboardInterrupt):        # before the loop, or after it
            print("interrupted; of a training the same command goes on from its last checkpoint",
                  file=sys.stderr)
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)         # as Python ends: shells ask what ended it
        if isinstance(error, (UserError, DataError)):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            print(f"error: {error}; the last checkpoint is whole: free some space, and the same "
                  "command goes on from it", file=sys.stderr)
            sys.exit(1)
        raise


def end_workers():
    """Kill the loader's workers after an error: its traceback keeps the loader alive, and Python
    waits at its end for children, which it asks by SIGTERM; these ignore that
    (`data.start_worker`)."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch makes another error of their end
        worker.kill()


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

def positive(kind=int, zero=False):
    """An argparse type: a finite number above zero (or not below it)."""
    def parse(text):
        value = kind(text)
        if not (value > 0 or (zero and value == 0)) or value == float("inf"):
            raise ValueError
        return value
    parse.__name__ = f"{'non-negative' if zero else 'positive'} {kind.__name__}"
    return parse


def share(text):
    """An argparse type: a part of one, but not all."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a share, from 0 to below 1, not {text}")
    return float(text)


def seed(text):
    """An argparse type. Generators are seeded by multiples of it, in 64 bits."""
    if not 0 <= int(text) < 2 ** 32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2**32 - 1, not {text!r}")
    return int(text)


def add_flags(parser, steps, batch, data, log=20, sample=250, save=500, remat="none"):
    """The flags of commands.md that every training script has; the caller gives the defaults
    (None: derived from --size)."""
    g = parser.add_argument_group("run")
    g.add_argument("--out", type=Path, help="run folder; one that holds a checkpoint is resumed")
    g.add_argument("--fresh", action="store_true", help="move an old run in --out aside")
    g.add_argument("--steps", type=positive(), default=steps, help="optimizer steps")
    g.add_argument("--batch", type=positive(), default=batch, help="images a step, all devices")
    g.add_argument("--micro-batch", type=positive(),
                   help="images at a time; accumulates to --batch")
    g.add_argument("--seed", type=seed, default=0, help="of all that is random")
    g.add_argument("--init", type=Path, help="start from these weights: a run folder or a file")
    g = parser.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=data, metavar="SOURCE[=WEIGHT]",
                   help="builtin:web|synthetic|text|hq|qa|align|brief, a folder, a .jsonl, or tar "
                   "shards")
    g.add_argument("--workers", type=positive(zero=True), default=1, help="loading processes")
    g = parser.add_argument_group("device")
    g.add_argument("--device", choices=["auto", "cpu", "cuda", "xla"], default="auto")
    g.add_argument("--dtype", choices=["bfloat16", "float32"],
                   help="of matrix products (default: bfloat16 where the device has it)")
    g.add_argument("--mesh", help="fsdp=8 or fsdp=16,tensor=4; default: all devices on fsdp")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile each block (default: on CUDA)")
    g.add_argument("--remat", choices=["none", "block"], default=remat,
                   help="recompute each block's activations in the backward pass")
    g = parser.add_argument_group("log")
    g.add_argument("--log-every", type=positive(), default=log)
    g.add_argument("--sample-every", type=positive(), default=sample)
    g.add_argument("--save-every", type=positive(), default=save)
    g.add_argument("--keep", type=positive(), default=2, help="checkpoints that are kept")
    g.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    g.add_argument("--dry-run", action="store_true", help="print the derived table and exit")
    g.add_argument("--json", action="store_true", help="with --dry-run: one JSON object")
    g.add_argument("--bench", type=positive(), nargs="?", const=20, metavar="N",
                   help="time N steps on --data (the first fifth not), write nothing, and exit")


def check_batch(args, devices, each=None):
    """Sizes that must divide, and what the devices cannot do. Fills --micro-batch: the whole batch,
    or at most `each` images a device. Raises UserError."""
    if args.json and not args.dry_run:
        raise UserError("--json is for --dry-run; the numbers of a run are in its log.jsonl")
    if args.compile and devices.target == "xla":
        raise UserError("--compile: not on xla, whose compiler takes the whole step; leave it out")
    n = devices.axes["fsdp"]
    most = min(args.batch, each * n if each else args.batch)
    flag = "--micro-batch" if args.micro_batch else "--batch"
    args.micro_batch = args.micro_batch or next(
        (b for b in range(most - most % n, 0, -n) if args.batch % b == 0), args.batch)
    if args.batch % args.micro_batch:
        raise UserError(f"--batch {args.batch} is not a multiple of --micro-batch "
                        f"{args.micro_batch}")
    if args.micro_batch % n:
        raise UserError(f"{flag} {args.micro_batch} is not a multiple of the {n} devices on the "
                        "fsdp axis; change it or --mesh")


def table(title, rows):
    """Print what was derived: [(name, value)], one line each."""
    def show(value):
        if isinstance(value, dict):
            return ", ".join(f"{k} {show(v)}" for k, v in value.items())
        if isinstance(value, (list, tuple)):
            numbers = all(isinstance(v, int) for v in value)
            return (" x " if numbers else "\n" + " " * 25).join(map(show, value))
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    print(title)
    for name, value in rows:
        print(f"  {name:<22} {show(value)}")


def memory_gb(trained, frozen, activations, ema, gathered=0):
    """Planned memory of one device by part, in GB: parameters that it stores, bytes of activations
    of the images that are on it at a time, and elements of `parallel.gathered`. fp32 weights,
    gradients, two moments, EMA."""
    parts = {"weights": 4 * (trained + frozen), "gradients": 4 * trained, "moments": 8 * trained,
             "ema": 4 * trained if ema else 0, "gathered": 4 * gathered, "activations": activations}
    return {k: v / 1e9 for k, v in {**parts, "total": sum(parts.values())}.items()}


def plan(title, args, devices, parameters, flops, memory,
         less="take a smaller --size, --ema 0", dtype=None, **rows):
    """Print what was derived: a table, or one object with --dry-run --json. Then, but for a dry
    run, `check_memory`. parameters: by group; flops: of an image, by part; memory: as there; dtype:
    of the networks, where it is not devices.dtype; rows: the script's own."""
    plain = devices.target == "cpu" and (dtype or devices.dtype) == torch.bfloat16
    summary = dict(
        parameters={**parameters, "total": sum(parameters.values())}, images_per_step=args.batch,
        images_at_a_time=args.micro_batch,
        train_tflop_per_image={k: v / 1e12 for k, v in flops.items()},
        memory_gb_per_device=memory(args.micro_batch), device=str(devices),
        dtype=str(devices.dtype).removeprefix("torch."),
        attention="plain products" if plain else "torch scaled_dot_product_attention", **rows)
    if args.dry_run and args.json:
        print(json.dumps(summary))
    elif devices.main:
        table(title, list(summary.items()))
    if not args.dry_run:
        check_memory(title, memory, args, devices, less)


def check_memory(title, memory, args, devices, less):
    """memory(images at a time) -> GB by part. Raises UserError where the plan does not fit, before
    training starts. Of the activations half must fit: they are counted for blocks that are not
    compiled. less: flags of this script that save memory."""
    have, need = parallel.free_gb(devices), memory(args.micro_batch)
    if have is None or need["total"] - need["activations"] / 2 <= have:
        return
    n = devices.axes["fsdp"]
    fits = next((b for b in range(args.micro_batch, 0, -1) if args.batch % b == 0 and b % n == 0
                 and memory(b)["total"] <= have), None)
    parts = ", ".join(f"{k} {v:.1f}" for k, v in need.items() if k != "total")
    raise UserError(
        f"{title} with {args.micro_batch // n} images at a time needs "
        f"{need['total']:.1f} GB a device ({parts}); {have:.1f} GB are free. "
        + (f"--micro-batch {fits} fits" if fits else
           f"Without images it needs {memory(0)['total']:.1f} GB: {less}, or more devices "
           "(torchrun)"))


def cosine(step, steps, warmup, final=0.0):
    """Factor of the learning rate: linear warm-up over `warmup` steps, then cosine to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    x = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * x))


# ------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------

def checkpoints(folder):
    """Those of a run folder, oldest first; a folder without meta.json is none."""
    return sorted((p for p in (folder / "checkpoints").glob("*")
                   if re.fullmatch(r"step-\d+", p.name) and (p / "meta.json").is_file()),
                  key=lambda p: int(p.name[5:]))


class Run:
    """Made before what is trained is: it refuses contradicting arguments and writes nothing. `load`
    opens `args.out` (made when missing), refuses a second process, and fills the tensors.

    Then: for step in run.progress(steps), for batch in run.micro_batches(batches), and at the end
    of a step run.end_step(...). run.meter takes what is logged; `start` is the step to go on from,
    0 for a new run. free: arguments that may change besides FREE. Under --bench the loop is the
    same, and nothing is written.
    """

    def __init__(self, args, devices, free=()):
        self.args, self.devices, self.dir = args, devices, args.out
        self.main, self.bar, self.wandb, self.latest = devices.main, None, None, None
        self.start, self.asked, self.stop = 0, False, False     # asked by a signal; at the step
        self.meter, self.skips, self.keys = Meter(), SkipCounter(), []  # keys of the step's samples
        self.norms, self.bad, self.skipped, self.skipped_keys = [], 0, 0, []    # _check_finite
        if args.bench:
            if args.wandb:
                raise UserError(f"--wandb {args.wandb}: --bench logs nothing; leave one of them "
                                "out")
            args.steps = args.bench
            return
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError(f"--wandb {args.wandb}: the wandb package is not installed; "
                            "pip install wandb, or leave the flag out: log.jsonl has it all")
        there = checkpoints(self.dir)
        if getattr(args, "export", False) and (args.fresh or not there):
            raise UserError("--export writes what is there, --fresh moves it aside: give one of "
                            "them" if args.fresh else f"--export: {self.dir} has no checkpoint")
        if not there and not args.fresh and (self.dir / "final").exists():
            raise UserError(f"--out {self.dir} holds final/ and no checkpoint to go on from; "
                            "--fresh moves it aside, or give another --out")
        here = self.dir.resolve()
        if args.fresh and here in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"--out {self.dir} --fresh: that would move the working folder aside; "
                            "give another --out")
        if args.fresh and args.init and here in (args.init.resolve(), *args.init.resolve().parents):
            raise UserError(f"--init {args.init} is in --out, which --fresh would move aside; give "
                            "another --out")
        args.dtype = str(devices.dtype).removeprefix("torch.")  # the one taken, typed or not
        mine = {k: v for k, v in json.loads(json.dumps(vars(args), default=str)).items()
                if k not in FREE and k not in free}
        self.saved_args = mine
        if there and not args.fresh:
            try:
                theirs = json.loads((there[-1] / "meta.json").read_text())["args"]
            except (ValueError, LookupError, TypeError):
                raise UserError(f"checkpoint {there[-1]} is damaged (meta.json); delete it to go "
                                "on from the one before")
            differ = [f"--{k.replace('_', '-')}: checkpoint {theirs.get(k)!r}, now {mine[k]!r}"
                      for k in mine if k in theirs and theirs[k] != mine[k]]
            if differ:
                raise UserError(f"{self.dir} was started with other arguments: "
                                f"{'; '.join(differ)}. Use the same, another --out, or --fresh")

    def _open(self):
        if self.args.fresh and self.main and self.dir.is_dir() and any(self.dir.iterdir()):
            self._lock()                                # an old run, not one that is running
            k = 1
            while (aside := self.dir.with_name(f"{self.dir.name}.old{k}")).exists():
                k += 1
            self.dir.rename(aside)
            print(f"moved the old run to {aside}")
        try:
            if self.main:
                self.dir.mkdir(parents=True, exist_ok=True)
                self._lock()
                for name in ("checkpoints", "samples"):
                    (self.dir / name).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.dir}: cannot make the run folder: {error.strerror}")
        parallel.barrier(self.devices)                  # the old folder is aside, the new one there
        self.latest = next(reversed(checkpoints(self.dir)), None)
        self.start = int(self.latest.name[5:]) if self.latest else 0
        here = self.dir.is_dir() and self.start + 1
        each, square = parallel.total([here, here ** 2], self.devices)
        if self.devices.world * square != each ** 2:        # not all the same: found by all
            raise UserError(f"--out {self.dir} is not the same folder in every process: give one "
                            "on a disk that all hosts see")
        if self.main and not self.latest and any((self.dir / "samples").iterdir()):
            print(f"{self.dir} holds a run without a checkpoint: it is started again")

    def _ask_to_stop(self, *_):
        self.asked = True

    def _start_wandb(self):
        import wandb                                            # only when asked
        path = self.dir / "wandb-id"                            # a resumed run goes on there too
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        self.wandb = wandb.init(project=self.args.wandb, config=self.saved_args,
                                name=self.dir.name, id=path.read_text(), resume="allow")

    def _lock(self):
        """One process a run folder. A POSIX lock: it dies with this process, even by kill -9, and
        the loader's workers, which may outlive it by seconds, do not inherit it."""
        try:
            self.lock = open(self.dir / "lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.dir} is in use by another process; give another --out")
        except OSError as error:
            raise UserError(f"--out {self.dir}: cannot write {error.filename}: {error.strerror}")

    def _sweep(self):
        """Delete what a cut save or deletion left, and all checkpoints but the last --keep; from
        each first what makes it one."""
        kept = checkpoints(self.dir)[-self.args.keep:]
        for old in (self.dir / "checkpoints").iterdir():
            if re.fullmatch(r"(step|\.writing)-\d+", old.name) and old not in kept:
                (old / "meta.json").unlink(missing_ok=True)
                shutil.rmtree(old)

    def _trim_log(self):
        """Drop lines after the checkpoint: the resumed run writes them again."""
        path = self.dir / "log.jsonl"
        if path.exists():
            keep = []
            for line in path.read_text().splitlines():
                try:
                    values = json.loads(line)
                    if values["step"] <= self.start:
                        keep.append(line + "\n")
                        self.skipped = values.get("skipped_updates", 0)
                        self.skips.count = values.get("skipped_records", 0)
                except (ValueError, KeyError):                  # a line cut by a kill
                    pass
            write_text(path, "".join(keep))

    def load(self, named):
        """Open the folder, fill `named` {key: tensor} from the latest checkpoint, if there is one,
        and only then write. Raises UserError too when the disk cannot hold the checkpoints to
        come."""
        self.named = named
        if self.args.bench:
            return
        self._open()
        need = sum(v.numel() * v.element_size() for v in named.values()) * (self.args.keep + 1)
        have = sum(f.stat().st_size for f in self.dir.glob("checkpoints/step-*/*"))
        free = shutil.disk_usage(self.dir).free
        if need - have > free:
            raise UserError(f"--out {self.dir}: {self.args.keep} checkpoints and one being written "
                            f"need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; lower --keep "
                            "or take another --out")
        if self.latest:
            self._read(named)
        if self.main:
            write_text(self.dir / "args.json", json.dumps(vars(self.args), indent=1, default=str))
            self._trim_log()
            self.file = open(self.dir / "log.jsonl", "a")
            if self.latest:
                self._sweep()                           # of what a cut deletion left
                print(f"resumed {self.dir} at step {self.start}")
            if self.args.wandb:
                self._start_wandb()

    def _read(self, named):
        before = next(reversed(checkpoints(self.dir)[:-1]), None)
        mend = f"delete it to go on from {before.name if before else 'the start'}"
        try:
            with contextlib.ExitStack() as stack:
                parts = {}                              # key -> its pieces: (first row, file)
                for path in sorted(self.latest.glob("state*.safetensors")):
                    f = stack.enter_context(safe_open(path, "pt"))
                    rows = json.loads((f.metadata() or {}).get("first_row", "{}"))
                    for key in f.keys():
                        parts.setdefault(key, []).append((rows.get(key, 0), f))
                check_keys({key: list(part.shape) for k, v in named.items() for key, part in
                            parallel.apart(k, torch.empty(v.shape, device="meta")).items()},
                           {k: stored_shape(k, pieces) for k, pieces in parts.items()},
                           f"checkpoint {self.latest} ({mend})")
                for key, tensor in named.items():
                    parallel.fill(key, tensor, functools.partial(read_rows, parts), self.devices)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"checkpoint {self.latest} is damaged ({error}); {mend}")

    def save(self, step, named):
        """Write checkpoints/step-N atomically, then drop all but the last --keep. Every process
        calls it and writes what it alone holds. A full disk leaves the older ones, and the run says
        so and goes on: there may be room for the next."""
        final = self.dir / "checkpoints" / f"step-{step:07d}"
        temporary, error = final.with_name(f".writing-{step}"), None
        rank = f"-{self.devices.rank}" if self.devices.rank else ""
        try:
            if self.main:
                self._sweep()
                temporary.mkdir()
        except OSError as e:
            error = e
        parallel.barrier(self.devices)
        tensors, rows = {}, {}
        for name, tensor in named.items():
            for key, part, first in parallel.pieces(name, tensor):
                tensors[key], rows[key] = part.contiguous(), first
        try:
            if tensors and error is None:
                path = temporary / f"state{rank}.safetensors"
                save_file(tensors, path, metadata={"first_row": json.dumps(rows)})
                fsync(path)
        except (OSError, SafetensorError) as e:
            error = e
        failed = parallel.total([error is not None], self.devices)[0] > 0
        try:
            if self.main and not failed:
                write_text(temporary / "meta.json",
                           json.dumps({"step": step, "args": self.saved_args}))
                fsync(temporary)
                temporary.rename(final)
                fsync(final.parent)
                self._sweep()
        except OSError as e:
            error, failed = e, True
        if failed and self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            self.print(f"could not save step {step}: {error or 'another process could not write'}; "
                       "the checkpoint before it is kept")
        if not failed:
            self.latest = final

    def export(self, name, tensors, config):
        """final/NAME.safetensors and final/config.json: plain files in the released key layout."""
        whole = {}
        for key, tensor in tensors.items():             # gathered by all, kept by one
            parts = parallel.apart(key, parallel.full(tensor))
            if self.main:
                whole.update({k: part.clone().contiguous() for k, part in parts.items()})
        if self.main:
            (self.dir / "final").mkdir(exist_ok=True)
            path = self.dir / "final" / f"{name}.safetensors"
            try:
                save_file(whole, path.with_suffix(".tmp"), metadata={"config": json.dumps(config)})
            except SafetensorError as error:            # a full disk: it has no errno
                raise UserError(f"cannot write {path}: {error}; the last checkpoint is whole: free "
                                "some space, and the same command goes on from it") from None
            path.with_suffix(".tmp").rename(path)
            write_text(self.dir / "final" / "config.json", json.dumps(config, indent=1))

    def progress(self, steps):
        """The iterator over the remaining steps, with tqdm's ETA on the main process. From here on
        a signal asks the loop to stop; before, there is nothing to save and it just ends."""
        if not self.args.bench:
            for s in (signal.SIGTERM, signal.SIGINT):
                signal.signal(s, self._ask_to_stop)
        parallel.step_done(self.devices)    # what was only recorded so far is not part of a step
        self.bar = tqdm(range(self.start, steps), initial=self.start, total=steps,
                        disable=not self.main, dynamic_ncols=True, mininterval=1)
        self.meter.start()
        return self.bar

    def micro_batches(self, batches):
        """Yields those of a step as the loader gives them; what it left out is counted."""
        for _ in range(self.args.batch // self.args.micro_batch):
            begin = time.perf_counter()
            batch = next(batches)
            self.meter.wait += time.perf_counter() - begin
            self.keys += batch["keys"]
            self.skips.update(batch["skipped"], self.args.micro_batch // self.devices.world,
                              batch.get("unfit", ()))
            yield batch

    def end_step(self, done, norm, flops, plot, sample=None, **values):
        """After `done` steps, what is due: a line of the log, samples, a checkpoint. norm: of the
        whole gradient; flops: training FLOPs an image of this step, by part; plot: keys for
        loss.png; sample(done) -> values of the samples; values: for the line. -> does the loop end
        here?"""
        parallel.step_done(self.devices)
        self.stop = parallel.total([self.asked], self.devices)[0] > 0   # of all, at the same step
        self.meter.step(self.args.batch, sum(flops.values()))
        self.norms.append((done, norm, self.keys))
        self.keys, args = [], self.args
        if args.bench:
            return self._bench(done, flops)
        due = lambda every: done % every == 0 or done == args.steps
        sampling, saving = due(args.sample_every), due(args.save_every) or self.stop
        logging = due(args.log_every) or sampling or saving
        if logging or self.devices.kind == "cpu":           # to read a norm is to wait for it
            self._check_finite()
        if logging:
            values.update(self.meter.read(self.devices))    # the speed is of what came before
            if sampling and sample:
                values.update(sample(done))
            self.log(done, **values)
            if sampling or self.stop:
                self.plot(plot)
            if saving:
                self.save(done, self.named)
            self.meter.start()
        stopped = self.stop and done < args.steps
        if stopped:
            self._say_how_to_resume(done)
        return stopped

    def _bench(self, done, flops):
        """After a fifth of the steps, at least one where there are two, the clock starts; from then
        on the host waits for the device only at the end. By part is by the FLOPs of the last step:
        its parts are not timed apart, which would slow it."""
        steps = self.args.steps
        warm = min(steps - 1, max(1, steps // 5))
        if done in (warm, steps):
            self._check_finite()
            values = self.meter.read(self.devices)
        if done == steps and self.main:
            self.bar.close()
            means = {k: values[k] for k in ("images_per_s", "tflops", "mfu", "memory_gb",
                                            "data_wait_s", "step_s")}
            for k in ("tflops", "mfu"):
                means[f"{k}_by_part"] = means[k] and {
                    part: means[k] * v / sum(flops.values()) for part, v in flops.items()}
            table(f"bench: mean of {steps - warm} steps", list(means.items()))
            print(json.dumps({"steps": steps - warm, **means}))
        return done == steps

    def _check_finite(self):
        """Count the updates that were skipped because the norm of the whole gradient is not finite
        (parallel.guarded_step: on all devices alike), with the samples' keys; ten in a row raise
        UserError."""
        norms, self.norms = self.norms, []
        for step, norm, keys in norms:
            if math.isfinite(norm := norm.item()):
                self.bad = 0
                continue
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
            self.skipped_keys += keys
            some = f", samples {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            self.print(f"step {step}: the gradient's norm is {norm}; the update is skipped "
                       f"({self.bad} in a row){some}")
            if self.bad == 10:
                raise UserError(f"ten steps in a row without a finite gradient, the last at step "
                                f"{step}{some}. Try a lower --lr, --dtype float32, or delete the "
                                "last checkpoints to go on from an earlier one")

    def print(self, text):
        (self.bar.write if self.bar is not None else print)(text)

    def log(self, step, **values):
        """One JSON line, and the short form on the progress bar; by every process."""
        records, = parallel.total([self.skips.count], self.devices)
        values = {k: v.item() if torch.is_tensor(v) else v for k, v in values.items()}
        if not self.main:
            return
        values = {"step": step, **values, "skipped_records": int(records),
                  "skipped_updates": self.skipped}
        if self.skipped_keys:
            values["skipped_samples"], self.skipped_keys = self.skipped_keys, []

        def plain(v):                           # JSON has neither nan nor infinity
            if isinstance(v, (list, tuple)):
                return list(map(plain, v))
            return v if not isinstance(v, float) else round(v, 7) if math.isfinite(v) else None
        values = {k: plain(v) for k, v in values.items()}
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        shown = ("loss", "images_per_s", "cond_spread", "lr", "tflops", "mfu", "psnr",
                 "data_wait_s", "memory_gb")
        short = {k: f"{v:.4g}" for k, v in values.items()
                 if isinstance(v, (int, float)) and k in shown}
        self.bar.set_postfix(short)
        if self.wandb:
            self.wandb.log({k: v for k, v in values.items() if isinstance(v, (int, float))},
                           step=step)

    def plot(self, keys):
        """Redraw loss.png from log.jsonl: one panel for each key that was logged."""
        if not self.main:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        lines = [json.loads(line) for line in (self.dir / "log.jsonl").read_text().splitlines()]
        keys = [k for k in keys if any(k in line for line in lines)]
        if not keys:
            return
        figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3), squeeze=False)
        for axis, key in zip(axes[0], keys):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axis.plot(*zip(*points), linewidth=1)
            axis.set(title=key, xlabel="step")
            axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(self.dir / "loss.png", dpi=110)
        plt.close(figure)

    def _say_how_to_resume(self, step):
        if self.main:
            self.bar.close()
            saved = self.latest is not None and self.latest.name == f"step-{step:07d}"
            print(f"stopped {'and saved' if saved else 'but could not save'} at step {step}; the "
                  f"same command {'without --fresh' if self.args.fresh else 'again'} goes on from "
                  f"{'there' if saved else self.latest or 'the start'}")

    def finish(self):
        """After the loop: the last checkpoint is whole, so a signal may just end the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.main:
            self.bar.close()
            if self.wandb:
                self.wandb.finish()


def stored_shape(key, parts):
    """The shape of a tensor whose pieces, by rows, are (first row, file)."""
    shapes = [f.get_slice(key).get_shape() for _, f in parts]
    return [sum(s[0] for s in shapes), *shapes[0][1:]] if shapes[0] else []


def read_rows(parts, key, first, last):
    """Rows first..last of a tensor, whoever wrote them; parts: key -> its pieces."""
    found = []
    for start, f in sorted(parts[key], key=lambda part: part[0]):
        rows = f.get_slice(key)
        if not rows.get_shape():
            return f.get_tensor(key)
        found.append(rows[max(0, first - start):max(0, last - start)])
    return torch.cat(found) if len(found) > 1 else found[0]


def averages(named, devices):
    """The start of the EMA: copies {key: tensor}, split as the parameters are."""
    ema = {k: p.detach().clone() for k, p in named.items()}
    for k, average in ema.items():
        parallel.mark(k, average, devices)
    return ema


def moments(optimizer, named, devices):
    """Adam's state, made now instead of at the first step -> {key: tensor} for checkpoints. The
    step count lives in one tensor a parameter, as torch.optim keeps it."""
    keys = {}
    for name, p in named.items():
        state = optimizer.state[p]
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
        parallel.mark("step", state["step"], devices)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
            parallel.mark(name, state[moment], devices)
        keys.update({f"optimizer.{name}.{k}": v for k, v in state.items()})
    return keys


def ema_weight(decay, step):
    """1 - decay; the first steps average over what there is, so that a short run is not dominated
    by the initial weights."""
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema, named, weight):
    """ema += weight (p - ema)"""
    for k, average in ema.items():
        average.lerp_(named[k], weight)


@torch.no_grad()
def swap(named, ema):
    """Exchange weights and their averages in place; twice is the identity."""
    for k, average in ema.items():
        keep = named[k].detach().clone()
        named[k].copy_(average)
        average.copy_(keep)


def sheet(images, columns, space=2):
    """Images [n,3,H,W] -> one [3,H',W'], row by row, white between them and where one lacks."""
    lack = -len(images) % columns
    x = torch.cat([images, torch.ones_like(images[:1]).expand(lack, -1, -1, -1)])
    x = F.pad(x, (0, space, 0, space), value=1).unflatten(0, (-1, columns))
    x = x.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)                # [3,rows*H,columns*W]
    return x[:, :x.shape[1] - space, :x.shape[2] - space]


def save_grid(images, path, columns=8):
    """images [n,3,H,W] in [0,1] -> one PNG, white around each."""
    x = F.pad(sheet(images.detach().float().cpu(), columns), (2,) * 4, value=1)
    x = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(x.numpy()).save(path)


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path, text):
    """Write through a temporary name, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync(temporary)
    temporary.rename(path)


class Meter:
    """Averages of what was logged since the last line, and the speed. What is added stays on the
    device until it is read: a sum there would be part of the next step's program."""

    def __init__(self):
        self.values, self.steps, self.images, self.flops, self.wait = [], 0, 0, 0.0, 0.0
        self.start()

    def start(self):
        """The clock, again where something else than training came between."""
        self.since = time.perf_counter()

    def add(self, share=1.0, **values):
        """Losses and the like, of a step or of a micro-batch, which is this share of it."""
        self.values.append((share, {k: v.detach() for k, v in values.items()}))

    def step(self, images, flops):
        """A step: its images, and training FLOPs for each. `wait`: seconds it waited for data."""
        self.steps, self.images, self.flops = (
            self.steps + 1, self.images + images, self.flops + images * flops)

    def read(self, devices):
        """-> dict of averages, each over the steps that have it (of sums and counts [n,2] the n
        quotients), with images_per_s, tflops, mfu, memory_gb, data_wait_s; and restarts."""
        sums, shares = {}, collections.Counter()
        for share, values in self.values:
            for k, v in values.items():
                sums[k] = sums.get(k, 0) + share * v.cpu()
                shares[k] += share
        numbers = [n for k, v in sums.items() for n in (v / shares[k]).flatten().tolist()]
        numbers, values = iter(parallel.mean(numbers, devices)), {}
        for k, v in sums.items():
            values[k] = next(numbers) if v.dim() == 0 else [
                s / c if c else None for s, c in ((next(numbers), next(numbers)) for _ in v)]
        seconds = time.perf_counter() - self.since
        tflops = self.flops / seconds / 1e12
        peak = parallel.peak_tflops(devices)
        values.update(images_per_s=self.images / seconds, tflops=tflops,
                      mfu=tflops / (peak * devices.count) if peak else None,
                      memory_gb=parallel.memory_gb(devices), data_wait_s=self.wait / self.steps,
                      step_s=seconds / self.steps)
        self.__init__()
        return values
