"""The run folder of the trainers: arguments, log, samples, checkpoints, resume.

    runs/dit-tiny/  args.json  config.json  log.jsonl  loss.png  samples/  checkpoints/  final/

A checkpoint is a folder with `state.safetensors` (weights, averages, optimizer state; each of
several processes writes a file with its rows) and `meta.json` (step, arguments). It is written
under another name, synced to disk and renamed, so an interrupted save never hides the one before.
The data's position, the learning rates and every random draw are functions of (seed, step), so
there is no generator state to save, and a resumed run repeats an uninterrupted one bit for bit.
"""
import importlib.util
import json
import math
import re
import shutil
import signal
import sys
import time

import torch
from tqdm import tqdm

import parallel
import weights
from cli import Stopped, UserError
from data import SkipCounter, WorkerDied, hash64
from runfiles import (
    DISK, check_folder, fsync, naming_the_older, open_folder, plain, plot_log, print_bench,
    read_log, read_meta, save_tensors, start_wandb, surviving, write_text)
from training import Meter

# Arguments that may differ when a run is resumed: they do not change the trained weights, or
# (device, compile, mesh, scan, remat) only by rounding.
FREE = {"out", "fresh", "workers", "device", "compile", "log_every", "sample_every", "save_every",
        "keep", "wandb", "dry_run", "bench", "json", "mesh", "sample_steps", "guidance", "decoder",
        "sample_prompts", "scan", "remat"}
OF_DEVICE = ("fused", "capturable", "foreach")      # options of an optimizer that may change too


def say(text):
    """Print a line above the bar, if there is one."""
    tqdm.write(text, file=sys.stderr)


class Run:
    """One run of a trainer. The constructor checks the arguments before the trained networks get
    their weights; it writes nothing. `load` opens the folder and fills the tensors. Then:

        for step in run.steps():
            for batch in run.micro_batches(loader): ...
            run.end_step(...)

    config: the content of config.json. free: arguments besides FREE that may change. meter: takes
    the values to log. start, done: number of steps before this process, and so far. With --bench
    nothing is written.
    """

    def __init__(self, args, devices, config=None, free=()):
        self.args, self.devices, self.dir, self.config = args, devices, args.out, config or {}
        self.main, self.bar, self.wandb, self.latest = devices.main, None, None, None
        self.start, self.done, self.signal = 0, 0, 0
        self.meter, self.skips, self.keys = Meter(), SkipCounter(), []  # keys: the step's samples
        self.norms, self.bad, self.skipped, self.skipped_keys = [], 0, 0, []
        if args.bench:
            args.steps = args.bench
            return
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError(f"--wandb {args.wandb}: the wandb package is not installed; pip "
                            "install wandb, or leave the flag out (log.jsonl has the same values)")
        saved = weights.checkpoints(self.dir)
        check_folder(self.dir, args, saved)
        args.dtype = str(devices.dtype).removeprefix("torch.")      # without --dtype, the default
        self.saved_args = {k: v for k, v in json.loads(json.dumps(vars(args), default=str)).items()
                           if k not in FREE and k not in free}
        if saved and not args.fresh:
            with naming_the_older(saved):
                theirs, _ = read_meta(saved[-1])
            differ = [f"--{k.replace('_', '-')}: checkpoint {theirs[k]!r}, now {v!r}"
                      for k, v in self.saved_args.items() if k in theirs and theirs[k] != v]
            if differ:
                raise UserError(f"{self.dir} was started with other arguments: "
                                f"{'; '.join(differ)}. Use the same, another --out, or --fresh")
            odd = [f"--{k.replace('_', '-')} {v}" for k, v in {**theirs, **self.saved_args}.items()
                   if v and (k in theirs) != (k in self.saved_args)]
            if odd and self.main:
                say(f"note: {self.dir} was started by other code; only one of the two knows "
                    f"{', '.join(odd)}")

    def load(self, tensors, optimizers=()):
        """Open the folder, and fill `tensors` {name: tensor} and the optimizers' state from the
        latest checkpoint, if there is one. args.json, config.json and the log are written only
        after everything was read."""
        self.tensors, self.optimizers = tensors, list(optimizers)
        self.names = {tensor: name for name, tensor in tensors.items()}
        parallel.init_moments(self.optimizers, self.names, self.devices)
        if self.args.bench:
            return
        self._open()
        self._check_disk()
        if self.latest:
            self._read()
        if not self.main:
            return
        write_text(self.dir / "args.json", json.dumps(vars(self.args), indent=1, default=str))
        write_text(self.dir / "config.json", json.dumps(self.config, indent=1))
        self._trim_log()
        self._sweep()
        if self.latest:
            print(f"resumed {self.dir} at step {self.start}")
        if self.args.wandb:
            self.wandb = start_wandb(self.dir, self.args.wandb, self.saved_args)

    def _open(self):
        """Make and lock the folder, and find its latest checkpoint."""
        if self.main:
            self.lock = open_folder(self.dir, self.args.fresh)
        parallel.barrier(self.devices)
        self.latest = next(reversed(weights.checkpoints(self.dir)), None)
        self.start = self.done = int(self.latest.name[5:]) if self.latest else 0
        seen = self.start + 1 if self.dir.is_dir() else 0
        together, = parallel.total([seen], self.devices)
        differ, = parallel.total([seen * self.devices.world != together], self.devices)
        if differ:                                      # in one process, so that all raise
            raise UserError(f"--out {self.dir} is not the same folder in every process; give one "
                            "on a disk that all hosts see")

    def _check_disk(self):
        """Raise UserError if the disk cannot hold the checkpoints to come."""
        moments = [p for o in self.optimizers for p in parallel.parameters_of(o)] * 2
        one = sum(t.nbytes for t in (*self.tensors.values(), *moments))
        need = one * (self.args.keep + 1)
        have = sum(f.stat().st_size for f in self.dir.glob("checkpoints/step-*/*"))
        free = shutil.disk_usage(self.dir).free
        if need - have > free:
            raise UserError(f"--out {self.dir}: {self.args.keep} checkpoints and one being written "
                            f"need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; lower --keep "
                            "or choose another --out")

    def _read(self):
        """Fill the tensors and the optimizers' state from the latest checkpoint."""
        with naming_the_older(weights.checkpoints(self.dir)):
            source = weights.open_checkpoint(self.latest)
            have = {key: shape for key, shape in source.shapes.items()
                    if not key.startswith("optimizer.")}
            want = {key: shape for name, tensor in self.tensors.items()
                    for key, shape in parallel.file_shapes(name, tensor.shape).items()}
            weights.check_keys(want, have, source.what)
            for name, tensor in self.tensors.items():
                parallel.load_rows(name, tensor, source.rows, self.devices)
            _, numbers = read_meta(self.latest)
            for optimizer in self.optimizers:
                self._read_optimizer(optimizer, source, numbers)
            groups = [group for o in self.optimizers for group in o.param_groups]
            for group, values in zip(groups, numbers["groups"]):
                group.update(values)

    def _read_optimizer(self, optimizer, source, numbers):
        """Rebuild the state of a torch optimizer. A state tensor of its parameter's shape is split
        like it. `_read` restores the numbers in its groups, such as Prodigy's estimate."""
        for p in parallel.parameters_of(optimizer):
            name, state = self.names[p], optimizer.state[p]
            prefix = f"optimizer.{next(iter(parallel.file_shapes(name, p.shape)))}."
            state.update({key.removeprefix(prefix): number for key, number in numbers.items()
                          if key.startswith(prefix)})
            for key in (key for key in source.shapes if key.startswith(prefix)):
                kind, shape, dtype = key.removeprefix(prefix), source.shapes[key], source.dtype(key)
                if kind not in state:                   # on xla it is there already
                    state[kind] = (torch.zeros_like(p, dtype=dtype) if shape == tuple(p.shape)
                                   else torch.zeros(shape, dtype=dtype, device=p.device))
                parallel.load_rows(f"optimizer.{name}.{kind}", state[kind], source.rows,
                                   self.devices)

    def save(self):
        """Write checkpoints/step-N atomically, then delete all but the last --keep. Each process
        writes the rows that it holds. If the disk fails, say so and go on."""
        final = self.dir / "checkpoints" / f"step-{self.done:07d}"
        temporary, failures = final.with_name(f".writing-{self.done}"), []
        with surviving(failures.append):
            if self.main:
                self._sweep()
                temporary.mkdir()
        parallel.barrier(self.devices)
        tensors, numbers, kept, first = dict(self.tensors), {"groups": []}, {}, {}
        for optimizer in self.optimizers:
            numbers["groups"] += [{k: v for k, v in group.items() if isinstance(v, (int, float))
                                   and k not in OF_DEVICE} for group in optimizer.param_groups]
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    place = tensors if torch.is_tensor(value) else numbers
                    place[f"optimizer.{self.names[p]}.{key}"] = value
        for name, tensor in tensors.items():            # by every process: some gather
            for key, part, row in parallel.rows_to_save(name, tensor):
                kept[key], first[key] = part.contiguous(), row
        with surviving(failures.append):
            if kept and not failures:
                rank = f"-{self.devices.rank}" if self.devices.rank else ""
                sums = {key: weights.crc32(part) for key, part in kept.items()}
                save_tensors(kept, temporary / f"state{rank}.safetensors",
                             {"first_row": json.dumps(first), "crc32": json.dumps(sums)})
        if parallel.total([len(failures)], self.devices)[0] and not failures:
            failures.append("another process could not write")
        with surviving(failures.append):
            if self.main and not failures:
                write_text(temporary / "meta.json", json.dumps(
                    {"step": self.done, "args": self.saved_args, "state": numbers}))
                fsync(temporary)
                temporary.rename(final)
                fsync(final.parent)
                self.latest = final
                self._sweep()
        if self.main and failures:
            shutil.rmtree(temporary, ignore_errors=True)
            say(f"could not save step {self.done}: {failures[0]}; older ones are kept")

    def _sweep(self):
        """Delete what an interrupted save left, and all checkpoints but the last --keep. meta.json,
        which makes a folder a checkpoint, goes first."""
        kept = weights.checkpoints(self.dir)[-self.args.keep:]
        old = [path for path in (self.dir / "checkpoints").iterdir() if path not in kept
               and path.is_dir() and re.fullmatch(r"(step|\.writing)-\d+", path.name)]
        for path in [*old, *self.dir.glob(".*-final")]:
            (path / "meta.json").unlink(missing_ok=True)
            shutil.rmtree(path)

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
            ask_to_stop = lambda number, _: setattr(self, "signal", number)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, ask_to_stop)
        parallel.step_done(self.devices)    # the start is no part of the first step's program
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        with tqdm(total=self.args.steps, initial=self.start, disable=not self.main,
                  dynamic_ncols=True, mininterval=1, bar_format=form) as self.bar:
            self.meter.start()
            for step in range(self.start, self.args.steps):
                torch.manual_seed(hash64("torch", self.args.seed, step, self.devices.rank))
                yield step                              # only a fork's dropout draws from torch

    def micro_batches(self, loader):
        """Yield the micro-batches of one step, on the device.

        batch["totals"] holds the sums of `counts` {name: number} over the step and all processes.
        batch[name] holds such a sum, at least 1, divided by the number of replicas, because their
        gradients are averaged: (sum of losses) / batch[name] adds up to the whole batch's mean.
        """
        batches, begin = [], time.perf_counter()
        try:
            for _ in range(self.args.batch // self.args.micro_batch):
                batches.append(next(loader))
        except WorkerDied:
            saved = self.latest and int(self.latest.name[5:]) == self.done
            # the other processes would not join this save, and --bench writes nothing
            if not (saved or self.args.bench or self.devices.world > 1):
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
        """Write the log line, the samples and the checkpoint that are due after `done` steps.

        norm: the gradient's norm, or a sum of norms; not finite if an update was skipped. flops:
        FLOPs per image of this step, by part. plot: keys of loss.png. sample(done) returns values
        for the log. Raises Stopped after a signal, once the run is saved.
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
        if done == self.start + 1 and not logging and self.main and self.devices.kind != "xla":
            self._show(loss=self.meter.loss())              # on xla this would be one more program
        if logging:
            values.update(self.meter.read(self.devices))    # the speed of what came before
            if sampling:
                self.bar.set_postfix_str("drawing samples")
                values.update(sample(done))
            self.log(done, **values)
            if self.main and (sampling or saving):
                with self.surviving("loss.png"):
                    plot_log(self.dir, plot)
            if saving:
                self.bar.set_postfix_str("saving")
                self.save()
                self._show(**values)
            self.meter.start()
        if stop and done < args.steps:
            if self.main:
                self.bar.close()
                self._say_how_to_resume()
            raise Stopped(self.signal or signal.SIGTERM)

    def _say_how_to_resume(self):
        saved = self.latest and int(self.latest.name[5:]) == self.done
        print(f"stopped {'and saved' if saved else 'but could not save'} at step {self.done}; the "
              f"same command {'without --fresh' if self.args.fresh else 'again'} goes on from "
              f"{'there' if saved else self.latest or 'the start'}")

    def _bench(self, done, flops):
        """Start the clock after a fifth of the steps, at least one, and print the mean at the end.
        In between the host does not wait for the device."""
        steps = self.args.steps
        warm = min(steps - 1, max(1, steps // 5))
        if done not in (warm, steps):
            return
        self._check_finite()
        values = self.meter.read(self.devices)
        if done == steps and self.main:
            self.bar.close()
            print_bench(values, flops, steps - warm)

    def _check_finite(self):
        """Report and count the updates that parallel.guarded_step skipped, because the gradient's
        norm was not finite. Raises UserError after ten in a row."""
        norms, self.norms = self.norms, []
        for step, norm, keys in norms:
            if math.isfinite(norm := norm.item()):
                self.bad = 0
                continue
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
            self.skipped_keys += keys
            some = f", samples {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            say(f"step {step}: the gradient's norm is {norm}; the update is skipped ({self.bad} in "
                f"a row){some}")
            if self.bad == 10:
                raise UserError(f"ten steps in a row without a finite gradient, the last at step "
                                f"{step}{some}. Try a lower --lr, --dtype float32, or delete the "
                                "last checkpoints to go on from an earlier one")

    def finish(self):
        """End the loop. The last checkpoint is whole, so a signal may now end the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.main:
            self.bar.close()
            if self.wandb:
                self.wandb.finish()

    # --------------------------------------------------------------------------------------------
    # The log
    # --------------------------------------------------------------------------------------------

    @staticmethod
    def surviving(what):
        """Return a context in which a failing disk is reported: training goes on without `what`."""
        return surviving(lambda error: say(f"could not write {what}: {error}; training goes on"))

    def log(self, step, **values):
        """Write one JSON line, and show the main values on the bar. Every process calls it."""
        records, = parallel.total([self.skips.count], self.devices)
        values = {k: v.item() if torch.is_tensor(v) else v for k, v in values.items()}
        if not self.main:
            return
        values = {"step": step, **{k: plain(v) for k, v in values.items()},
                  "skipped_records": int(records), "skipped_updates": self.skipped}
        if self.skipped_keys:
            values["skipped_samples"], self.skipped_keys = self.skipped_keys, []
        with self.surviving("log.jsonl"), open(self.dir / "log.jsonl", "ab", buffering=0) as f:
            f.write((json.dumps(values) + "\n").encode())  # one write: a kill cannot cut the line
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
        """Drop the log's damaged lines, and those after the checkpoint, which come again."""
        lines = [v for v in read_log(self.dir / "log.jsonl") if v["step"] <= self.start]
        if lines:
            self.skipped = lines[-1].get("skipped_updates", 0)
            self.skips.count = lines[-1].get("skipped_records", 0)
        write_text(self.dir / "log.jsonl", "".join(json.dumps(v) + "\n" for v in lines))
