"""The run folder of the trainers: arguments, log, plot, samples, checkpoints, resume.

    runs/dit-tiny/  args.json  config.json  log.jsonl  loss.png  samples/  checkpoints/  final/

A checkpoint is a folder with `state.safetensors` (weights, averages, optimizer state; with several
processes one file each, with its rows) and `meta.json` (step, arguments). It is written under
another name, synced to disk and renamed, so a save that is cut short never hides the one before.
The data's position, the learning rates and every random draw are functions of (seed, step), so
there is no generator's state to save, and a resumed run repeats an uninterrupted one bit for bit.
"""
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import parallel
import weights
from cli import Stopped, UserError, parsing, table
from data import SkipCounter, WorkerDied
from training import Meter

# Arguments that may differ when a run is resumed: they do not change what is computed, or (device,
# compile, mesh, scan, remat) only its rounding.
FREE = {"out", "fresh", "workers", "device", "compile", "log_every", "sample_every", "save_every",
        "keep", "wandb", "dry_run", "bench", "json", "mesh", "sample_steps", "guidance", "decoder",
        "sample_prompts", "scan", "remat"}
DISK = (OSError, SafetensorError)       # what a full or vanished disk raises


# ------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------

class Run:
    """Made before the networks: it refuses contradicting arguments and writes nothing. `load` opens
    the folder, refuses a second process, and fills the tensors from the latest checkpoint.

    Then: for step in run.steps(), for batch in run.micro_batches(loader), and at the end of a step
    run.end_step(...). run.meter takes the values to log; `start` is the step to go on from. config:
    the network's config.json. free: arguments that may change besides FREE. Under --bench the loop
    is the same and nothing is written.
    """

    def __init__(self, args, devices, config=None, free=()):
        self.args, self.devices, self.dir, self.config = args, devices, args.out, config or {}
        self.main, self.bar, self.wandb, self.latest = devices.main, None, None, None
        self.start, self.done, self.signal, self.has_targets = 0, 0, 0, True
        self.meter, self.skips, self.keys = Meter(), SkipCounter(), []      # keys: of this step
        self.norms, self.bad, self.skipped, self.skipped_keys = [], 0, 0, []
        if args.bench:
            args.steps = args.bench
            return
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError(f"--wandb {args.wandb}: the wandb package is not installed; pip "
                            "install wandb, or leave the flag out (log.jsonl has the same values)")
        saved, here = weights.checkpoints(self.dir), self.dir.resolve()
        if not saved and not args.fresh and (self.dir / "final").exists():
            raise UserError(f"--out {self.dir} holds final/ and no checkpoint to go on from; "
                            "--fresh moves it aside, or give another --out")
        used = [Path.cwd(), *([Path(args.init).resolve()] if args.init else [])]
        if args.fresh and any(here in (path, *path.parents) for path in used):
            raise UserError(f"--out {self.dir} --fresh would move aside the working folder or "
                            "--init; give another --out")
        args.dtype = str(devices.dtype).removeprefix("torch.")      # the one in use, given or not
        self.saved_args = {k: v for k, v in json.loads(json.dumps(vars(args), default=str)).items()
                           if k not in FREE and k not in free}
        if saved and not args.fresh:
            theirs = self._read_meta(saved[-1])["args"]
            differ = [f"--{k.replace('_', '-')}: checkpoint {theirs[k]!r}, now {v!r}"
                      for k, v in self.saved_args.items() if k in theirs and theirs[k] != v]
            if differ:
                raise UserError(f"{self.dir} was started with other arguments: "
                                f"{'; '.join(differ)}. Use the same, another --out, or --fresh")

    def _read_meta(self, folder):
        with parsing(f"checkpoint {folder} is damaged: meta.json", folder / "meta.json"):
            meta = json.loads((folder / "meta.json").read_text())
            return {"args": dict(meta["args"]), "state": dict(meta.get("state", {}))}

    def load(self, tensors, optimizers=()):
        """Open the folder and fill `tensors` {name: tensor} and the optimizers' state from the
        latest checkpoint, if there is one. Only then write."""
        self.tensors, self.optimizers = tensors, list(optimizers)
        names = {id(t): name for name, t in tensors.items()}
        if self.devices.kind == "xla":
            for o in self.optimizers:
                parallel.init_moments(o, {names[id(p)]: p for group in o.param_groups
                                          for p in group["params"]}, self.devices)
        if self.args.bench:
            return
        self._open()
        self._check_disk(tensors)
        if self.latest:
            self._read(tensors, names)
        if self.main:
            write_text(self.dir / "args.json", json.dumps(vars(self.args), indent=1, default=str))
            write_text(self.dir / "config.json", json.dumps(self.config, indent=1))
            self._trim_log()
            self._sweep()
            if self.latest:
                print(f"resumed {self.dir} at step {self.start}")
            if self.args.wandb:
                self._start_wandb()

    def _open(self):
        real = self.dir.resolve()                       # a link to a folder stays a link
        if self.args.fresh and self.main and real.is_dir() and any(real.iterdir()):
            self._lock()                                # an old run, not one that is running
            k = 1
            while (aside := real.with_name(f"{real.name}.old{k}")).exists():
                k += 1
            real.rename(aside)
            print(f"moved the old run to {aside}")
        try:
            if self.main:
                real.mkdir(parents=True, exist_ok=True)
                self._lock()
                for name in ("checkpoints", "samples"):
                    (self.dir / name).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.dir}: cannot make the run folder: {error.strerror}")
        parallel.barrier(self.devices)
        self.latest = next(reversed(weights.checkpoints(self.dir)), None)
        self.start = self.done = int(self.latest.name[5:]) if self.latest else 0
        seen = self.dir.is_dir() and self.start + 1
        each, square = parallel.total([seen, seen ** 2], self.devices)
        if self.devices.world * square != each ** 2:        # found by all processes alike
            raise UserError(f"--out {self.dir} is not the same folder in every process; give one "
                            "on a disk that all hosts see")

    def _lock(self):
        """Hold one POSIX lock per run folder: it ends with this process, even by kill -9, and the
        loader's workers, which may outlive it by seconds, do not inherit it."""
        try:
            import fcntl
        except ImportError:
            raise UserError("training needs Linux or macOS: this system has no file locks (fcntl)")
        try:
            self.lock = open(self.dir / "lock", "w")
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.dir} is in use by another process; give another --out")
        except OSError as error:
            raise UserError(f"--out {self.dir}: cannot write {error.filename}: {error.strerror}")

    def _check_disk(self, tensors):
        """Raise UserError if the disk cannot hold the checkpoints to come."""
        trained = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        need = sum(v.numel() * v.element_size() for v in (*tensors.values(), *trained, *trained))
        need *= self.args.keep + 1                      # trained twice: two moments each
        have = sum(f.stat().st_size for f in self.dir.glob("checkpoints/step-*/*"))
        free = shutil.disk_usage(self.dir).free
        if need - have > free:
            raise UserError(f"--out {self.dir}: {self.args.keep} checkpoints and one being written "
                            f"need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; lower --keep "
                            "or take another --out")

    def _read(self, tensors, names):
        """Fill the tensors and the optimizers' state from the latest checkpoint."""
        before = weights.checkpoints(self.dir)[:-1]
        try:
            source = weights.open_checkpoint(self.latest)
            state = {key: shape for key, shape in source.shapes.items()
                     if key.startswith("optimizer.")}
            want = {key: tuple(part.shape) for name, t in tensors.items() for key, part in
                    parallel.unstack(name, torch.empty(t.shape, device="meta")).items()}
            weights.check_keys(want, {k: s for k, s in source.shapes.items() if k not in state},
                               source.what)
            for name, tensor in tensors.items():
                parallel.fill(name, tensor, source.rows, self.devices)
            numbers = self._read_meta(self.latest)["state"]
            for optimizer in self.optimizers:
                self._read_optimizer(optimizer, names, source, numbers)
        except UserError as error:
            raise UserError(f"{error}; delete {self.latest} to go on from "
                            f"{before[-1].name if before else 'the start'}")

    def _read_optimizer(self, optimizer, names, source, numbers):
        """Rebuild the state of any torch optimizer. A state tensor of the parameter's shape is
        split as the parameter is."""
        made = {}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[id(p)]
            first = next(iter(parallel.unstack(name, torch.empty(p.shape, device="meta"))))
            prefix, ours = f"optimizer.{first}.", optimizer.state.get(p, {})
            state = {k: v for k, v in numbers.items() if k.startswith(prefix)}
            state = {k.removeprefix(prefix): v for k, v in state.items()}
            for key in (k for k in source.shapes if k.startswith(prefix)):
                kind = key.removeprefix(prefix)
                like = torch.zeros_like(p) if source.shapes[key] else torch.zeros(())
                state[kind] = ours.get(kind, like)
                parallel.fill(f"optimizer.{name}.{kind}", state[kind], source.rows, self.devices)
            made[p] = state
        order = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.load_state_dict({"param_groups": optimizer.state_dict()["param_groups"],
                                   "state": {i: made[p] for i, p in enumerate(order) if made[p]}})

    def _state(self):
        """Return all tensors to save, and the optimizers' plain numbers."""
        names = {id(t): name for name, t in self.tensors.items()}
        tensors, numbers = dict(self.tensors), {}
        for p, state in (item for o in self.optimizers for item in o.state.items()):
            for key, value in state.items():
                place = tensors if torch.is_tensor(value) else numbers
                place[f"optimizer.{names[id(p)]}.{key}"] = value
        return tensors, numbers

    def save(self):
        """Write checkpoints/step-N atomically, then drop all but the last --keep. Every process
        writes what it alone holds. If the disk fails, the run says so and goes on."""
        final = self.dir / "checkpoints" / f"step-{self.done:07d}"
        temporary, failure = final.with_name(f".writing-{self.done}"), ""
        tensors, numbers = self._state()
        try:
            if self.main:
                self._sweep()
                temporary.mkdir()
        except OSError as error:
            failure = str(error)
        parallel.barrier(self.devices)
        kept, first = {}, {}
        for name, tensor in tensors.items():            # by every process: some gather
            for key, part, row in parallel.pieces(name, tensor):
                kept[key], first[key] = part.contiguous(), row
        try:
            if kept and not failure:
                rank = f"-{self.devices.rank}" if self.devices.rank else ""
                sums = {key: weights.crc32(part) for key, part in kept.items()}
                save_tensors(kept, temporary / f"state{rank}.safetensors",
                             {"first_row": json.dumps(first), "crc32": json.dumps(sums)})
        except DISK as error:
            failure = str(error)
        failed = parallel.total([bool(failure)], self.devices)[0] > 0
        try:
            if self.main and not failed:
                write_text(temporary / "meta.json", json.dumps(
                    {"step": self.done, "args": self.saved_args, "state": numbers}))
                fsync(temporary)
                temporary.rename(final)
                fsync(final.parent)
                self._sweep()
        except OSError as error:
            failure, failed = str(error), True
        if failed and self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            self.print(f"could not save step {self.done}: "
                       f"{failure or 'another process could not write'}; older ones are kept")
        self.latest = self.latest if failed else final

    def _sweep(self):
        """Delete what a cut save left, and all checkpoints but the last --keep; the file that makes
        a folder a checkpoint goes first."""
        kept = weights.checkpoints(self.dir)[-self.args.keep:]
        for old in [*(self.dir / "checkpoints").iterdir(), *self.dir.glob(".writing-final"),
                    *self.dir.glob(".old-final")]:
            if re.fullmatch(r"(step|\.writing)-\d+|\.(writing|old)-final", old.name) \
                    and old not in kept:
                (old / "meta.json").unlink(missing_ok=True)
                shutil.rmtree(old)

    def export(self, name, tensors, config):
        """Write NAME.safetensors and config.json for final/, in the released key layout; `publish`
        puts them there. tensors: {key: tensor}."""
        folder, whole = self.dir / ".writing-final", {}
        for key, tensor in tensors.items():             # gathered by all, kept by one
            parts = parallel.unstack(key, parallel.full_tensor(tensor))
            if self.main:
                whole.update({k: part.clone().contiguous() for k, part in parts.items()})
        if not self.main:
            return
        if bad := [k for k, v in whole.items() if v.is_floating_point() and not v.isfinite().all()]:
            raise UserError(f"{self.dir}: {bad[0]} holds NaN or infinity; final/ is not written")
        try:
            folder.mkdir(exist_ok=True)
            save_tensors(whole, folder / f"{name}.safetensors", {"config": json.dumps(config)})
            write_text(folder / "config.json", json.dumps(config, indent=1))
        except DISK as error:
            raise UserError(f"cannot write {self.dir}/final: {error}; the last checkpoint is "
                            "whole: free some space and run the same command again") from None

    def publish(self):
        """Put what `export` wrote into final/ -> the folder."""
        final, old = self.dir / "final", self.dir / ".old-final"
        if self.main:
            if final.exists():
                final.rename(old)
            (self.dir / ".writing-final").rename(final)
            shutil.rmtree(old, ignore_errors=True)
        return final

    # --------------------------------------------------------------------------------------------
    # The loop
    # --------------------------------------------------------------------------------------------

    def steps(self):
        """Yield the remaining steps, with a bar on the main process. From here on a signal asks the
        loop to stop; before, there is nothing to save."""
        if not self.args.bench:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask_to_stop)
        parallel.step_done(self.devices)    # what was only recorded so far is not part of a step
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        with tqdm(total=self.args.steps, initial=self.start, disable=not self.main,
                  dynamic_ncols=True, mininterval=1, bar_format=form) as self.bar:
            self.meter.start()
            yield from range(self.start, self.args.steps)

    def _ask_to_stop(self, number, _):
        self.signal = number

    def micro_batches(self, loader):
        """Yield the micro-batches of one step, on the device. The `counts` {name: number} of a
        batch are summed over the step and all processes (`totals`), and divided by the processes
        whose gradients are averaged: losses divided by them are means over the whole batch."""
        batches, begin = [], time.perf_counter()
        try:
            for _ in range(self.args.batch // self.args.micro_batch):
                batches.append(next(loader))
        except WorkerDied:
            self.save()
            raise
        self.meter.wait += time.perf_counter() - begin
        for batch in batches:
            self.keys += batch["keys"]
            self.skips.update(batch["skipped"], self.args.micro_batch // self.devices.world,
                              batch.get("rejected", ()))
        names = sorted(batches[0].get("counts", {}))
        sums = parallel.total([sum(b["counts"][k] for b in batches) for k in names], self.devices)
        self.totals = dict(zip(names, sums))
        shares = {k: max(n, 1) / self.devices.replicas for k, n in self.totals.items()}
        for batch in batches:
            batch = parallel.to_device(batch, self.devices)
            yield {**batch, "totals": self.totals, **{
                k: parallel.scalar(v, self.devices.device) for k, v in shares.items()}}

    def end_step(self, done, norm, flops, plot, sample=None, **values):
        """After `done` steps, do what is due: a line of the log, samples, a checkpoint.

        norm: of the whole gradient. flops: per image of this step, by part. plot: keys for
        loss.png. sample(done) returns values for the log. Raises Stopped after a signal, when the
        run is saved.
        """
        parallel.step_done(self.devices)
        self.done, args = done, self.args
        stop = parallel.total([self.signal], self.devices)[0] > 0   # all processes at one step
        self.meter.step(args.batch, sum(flops.values()))
        self.bar.update()
        self.norms.append((done, norm, self.keys))
        self.keys = []
        if args.bench:
            return self._bench(done, flops)
        due = lambda every: every and (done % every == 0 or done == args.steps)
        sampling, saving = due(args.sample_every) and sample, due(args.save_every) or stop
        logging = due(args.log_every) or sampling or saving
        if logging or self.devices.kind == "cpu":           # to read a norm is to wait for it
            self._check_finite()
        if done == self.start + 1 and not logging and self.main:
            self._show(loss=self.meter.loss())
        if logging:
            values.update(self.meter.read(self.devices))    # the speed of what came before
            if sampling:
                self.bar.set_postfix_str("drawing samples")
                values.update(sample(done))
            self.log(done, **values)
            if sampling or saving:
                self.plot(plot)
            if saving:
                self.bar.set_postfix_str("saving")
                self.save()
                self._show(**values)
            self.meter.start()
        if stop and done < args.steps:
            self._say_how_to_resume()
            raise Stopped(self.signal or signal.SIGTERM)

    def _bench(self, done, flops):
        """Start the clock after a fifth of the steps, at least one; from then on the host waits for
        the device only at the end. Parts are by the last step's FLOPs: timing them would slow it.
        """
        steps = self.args.steps
        warm = min(steps - 1, max(1, steps // 5))
        if done not in (warm, steps):
            return
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

    def _check_finite(self):
        """Count the updates that were skipped because the gradient's norm is not finite
        (parallel.guarded_step), with the samples' keys; ten in a row raise UserError."""
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

    def _say_how_to_resume(self):
        if self.main:
            self.bar.close()
            saved = self.latest is not None and self.latest.name == f"step-{self.done:07d}"
            same = "without --fresh" if self.args.fresh else "again"
            print(f"stopped {'and saved' if saved else 'but could not save'} at step {self.done}; "
                  f"the same command {same} goes on from "
                  f"{'there' if saved else self.latest or 'the start'}")

    def finish(self):
        """After the loop the last checkpoint is whole, so a signal may just end the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.main:
            self.bar.close()
            if self.wandb:
                self.wandb.finish()

    # --------------------------------------------------------------------------------------------
    # The log
    # --------------------------------------------------------------------------------------------

    def print(self, text):
        (self.bar.write if self.bar is not None else print)(text, file=sys.stderr)

    @contextlib.contextmanager
    def surviving(self, what):
        """Say that a disk failed and go on: a log line or an image is not worth a run."""
        try:
            yield
        except DISK as error:
            self.print(f"could not write {what}: {error}; training goes on")

    def log(self, step, **values):
        """Write one JSON line and the short form on the bar. Every process calls it."""
        records, = parallel.total([self.skips.count], self.devices)
        values = {k: v.item() if torch.is_tensor(v) else v for k, v in values.items()}
        if not self.main:
            return
        values = {"step": step, **values, "skipped_records": int(records),
                  "skipped_updates": self.skipped}
        if self.skipped_keys:
            values["skipped_samples"], self.skipped_keys = self.skipped_keys, []

        def plain(v):                           # JSON has neither NaN nor infinity
            if isinstance(v, (list, tuple)):
                return list(map(plain, v))
            return v if not isinstance(v, float) else round(v, 7) if math.isfinite(v) else None
        values = {k: plain(v) for k, v in values.items()}
        with self.surviving("log.jsonl"), open(self.dir / "log.jsonl", "ab", buffering=0) as f:
            f.write((json.dumps(values) + "\n").encode())
        self._show(**values)
        if self.wandb:
            self.wandb.log({k: v for k, v in values.items() if isinstance(v, (int, float))},
                           step=step)

    def _show(self, **values):
        """Show some values on the bar; the whole line fits 80 columns."""
        forms = dict(loss="loss {:.3g}", images_per_s="{:.4g} img/s", cond_spread="spread {:.2g}",
                     psnr="{:.3g} dB")
        self.bar.set_postfix_str(", ".join(form.format(float(values[k])) for k, form in
                                           forms.items() if values.get(k) is not None))

    def _trim_log(self):
        """Drop lines after the checkpoint, which the resumed run writes again, and damaged ones."""
        lines = [v for v in read_log(self.dir / "log.jsonl") if v["step"] <= self.start]
        if lines:
            self.skipped = lines[-1].get("skipped_updates", 0)
            self.skips.count = lines[-1].get("skipped_records", 0)
        write_text(self.dir / "log.jsonl", "".join(json.dumps(v) + "\n" for v in lines))

    def _start_wandb(self):
        import wandb                                            # only when asked
        path = self.dir / "wandb-id"                            # a resumed run goes on there too
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        self.wandb = wandb.init(project=self.args.wandb, config=self.saved_args,
                                name=self.dir.name, id=path.read_text(), resume="allow")

    def plot(self, keys):
        """Redraw loss.png from log.jsonl: one panel for each key that was logged."""
        if not self.main:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        lines = read_log(self.dir / "log.jsonl")
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
        with self.surviving("loss.png"):
            figure.savefig(self.dir / "loss.png", dpi=110)
        plt.close(figure)


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def read_log(path):
    """Return the lines of log.jsonl as dicts, without damaged ones."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                lines.append(values)
    return lines


def save_tensors(tensors, path, metadata):
    """Write a safetensors file to disk, with the mode that umask asks for."""
    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    fsync(path)


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path, text):
    """Write through a temporary name, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.rename(path)
