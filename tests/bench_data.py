"""Measure how many 224 px images per second data.py decodes from tars of 512 px JPEGs.

    python tests/bench_data.py                      # write 4 tars of 250 images, then read them
    python tests/bench_data.py --data shards/       # read your own

The figure per core uses the CPU time of this process and of its workers, so that other work on the
machine does not count; wall time is printed beside it. The target is 300 per core. Pillow decodes a
JPEG at 1/2, 1/4 or 1/8 of its size where the crop needs no more (draft mode); a random crop, from a
short side of 336, needs more.
"""
import argparse
import io
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data                                                             # noqa: E402
from tiny import world                                                  # noqa: E402


def write(folder, tars, each, side, quality):
    """Write tars of scenes with noise, so that a JPEG is as large as a photo's -> KB per image."""
    size, noise = 0, np.random.RandomState(0).normal(0, 10, (side, side, 3))
    for shard in range(tars):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for n in range(shard * each, (shard + 1) * each):
                record, jpeg = world.builtin_record("builtin:web", 0, n, side), io.BytesIO()
                pixels = (record["image"] + np.roll(noise, 7 * n, 0)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(jpeg, "JPEG", quality=quality)
                text = record["caption"].encode()
                for name, content in (("jpg", jpeg.getvalue()), ("txt", text)):
                    member = tarfile.TarInfo(f"{n:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                size += len(jpeg.getvalue())
    return size / tars / each / 1000


def cpu_seconds():
    """Return the CPU time of this process and of its workers so far (Linux)."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", help="shards to read (default: written to a temporary folder)")
    p.add_argument("--tars", type=int, default=4)
    p.add_argument("--each", type=int, default=250, help="images per tar")
    p.add_argument("--quality", type=int, default=90, help="JPEG quality")
    p.add_argument("--resolution", type=int, default=224)
    p.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    p.add_argument("--count", type=int, default=1500, help="images per measurement")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            kb = write(Path(folder), args.tars, args.each, 512, args.quality)
            print(f"{args.tars} tars of {args.each} JPEGs of 512 px, {kb:.0f} KB each")
        for crop in data.CROPS:
            for workers in args.workers:
                mixture = data.Mixture([args.data or folder], args.resolution, crop=crop)
                batches = data.loader(mixture, lambda rows: np.stack([r["image"] for r in rows]),
                                      32, workers=workers)
                for _ in range(5 * workers + 1):    # until the queues are full
                    next(batches)
                wall, cpu, seen = time.perf_counter(), cpu_seconds(), 0
                while seen < args.count:
                    seen += len(next(batches))
                wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
                print(f"{crop:>7}, {workers or 'no'} workers: {seen / cpu:.0f} images/s per core, "
                      f"{seen / wall:.0f} images/s of wall time")


if __name__ == "__main__":
    main()
