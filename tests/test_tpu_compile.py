"""The TPU compiler ahead of time, at tiny size: is the traced program the one a run compiles, and
does it compile? In an environment with requirements-tpu.txt:

    pytest tests/test_tpu_compile.py
"""
import collections
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tests" / "tpu_compile.py"
sys.path.insert(0, str(TOOL.parent))
import tpu_compile


def needs(*packages):
    absent = ", ".join(p for p in packages if importlib.util.find_spec(p) is None)
    return pytest.mark.skipif(bool(absent), reason=f"needs {absent}: requirements-tpu.txt")


def operations(hlo):
    """HLO text -> how often each (operation, shape, sharding) occurs, computations and all.

    A real argument carries its sharding, a placeholder's is a custom call on it: the call is taken
    away and its sharding given to the argument. Replicated is the same as not said; the results of
    the program may come in another order.
    """
    line = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$", re.M)
    found, calls = [], {}
    for name, shape, operation, rest in line.findall(hlo):
        shape = re.findall(r"\w+\[[\d,]*\]", shape)                     # no layouts
        shape = " ".join(sorted(shape) if operation == "tuple" else shape)
        sharding = re.search(r"sharding=\{((?:[^{}]|\{[^{}]*\})*)\}", rest)
        sharding = sharding[1] if sharding and sharding[1] != "replicated" else ""
        operand = re.match(r"(?:[^ ()]+ )?%?([\w.\-]+)\)", rest)
        if operation == "custom-call" and '"Sharding"' in rest and operand:
            calls[operand[1]] = sharding
        found.append([name, operation, shape, sharding, operand and operand[1], rest])
    arguments = {name for name, operation, *_ in found if operation == "parameter"}
    count = collections.Counter()
    for name, operation, shape, sharding, operand, rest in found:
        if operation == "custom-call" and '"Sharding"' in rest and operand in arguments:
            continue
        if operation == "parameter" and not sharding:
            sharding = calls.get(name, "")
        count[operation, shape, sharding] += 1
    return count


def step_of_a_run(folder):
    """The program of a training step as train_dit.py hands it to the compiler on 4 virtual devices:
    of the dumped ones the largest. The run is ended when it is there."""
    environment = dict(os.environ, PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4", XLA_FLAGS=(
        f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_backend_optimization_level=0"))
    run = subprocess.Popen(
        [sys.executable, ROOT / "train_dit.py", "--batch", "8", "--steps", "1", "--workers", "0",
         "--sample-steps", "1", "--guidance", "1", "--out", folder / "run"], env=environment,
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            for path in folder.glob("*before_optimizations.txt"):
                if " while(" in path.read_text():
                    time.sleep(2)                                       # written to its end
                    return path.read_text()
            assert run.poll() is None, "the run ended without a program that has a loop"
            time.sleep(1)
    finally:
        run.kill()
        run.wait()
    raise AssertionError("no step was compiled within four minutes")


@pytest.mark.slow
@needs("torch_xla", "jax", "flax")
def test_the_traced_step_is_the_one_a_run_compiles(tmp_path):
    """Operations, shapes and shardings of the whole program; which arguments give their memory."""
    code = ("import pickle, sys, tpu_compile; "
            "pickle.dump(tpu_compile.trace(['--batch', '8'], None, 4), open(sys.argv[1], 'wb'))")
    subprocess.run([sys.executable, "-c", code, tmp_path / "step.pkl"], cwd=TOOL.parent, check=True)
    from jaxlib.xla_client import _xla
    program = pickle.loads((tmp_path / "step.pkl").read_bytes())
    traced = _xla.HloModule.from_serialized_hlo_module_proto(program["hlo"]).to_string()
    real = step_of_a_run(tmp_path)
    traced, ran = operations(traced), operations(real)
    assert sum(ran.values()) > 5000
    assert traced - ran == ran - traced == collections.Counter()
    assert len(re.findall(r"\(\d+, \{\}\)", re.search(r"buffer_donor=\{(.*?)\}, entry", real)[1])) \
        == len(program["donate"])


@pytest.mark.slow
@needs("torch_xla", "jax", "flax", "libtpu")
def test_a_small_topology_compiles():
    """The DiT of the tiny preset for four chips: it fits, memory is given back, and the blocks move
    no activations."""
    done = subprocess.run([sys.executable, TOOL, "--topology", "v5e:2x2", "--batch", "8", "--llm",
                           "none"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    gib = found["gib_per_chip"]
    state = 16 * found["trained"] / 4 / 2 ** 30         # weights, two moments, EMA: a quarter
    assert state < gib["alias"] <= gib["argument"] < 1.5 * state
    assert gib["temp"] < 0.1
    assert found["collective_gib_per_chip"]["weight"] > 0
    assert not any("in a loop" in key and key.startswith("all-reduce")
                   for key in found["activation_collectives"]), found["activation_collectives"]


def test_collectives_are_read_by_channel_and_by_loop():
    hlo = """HloModule step
%windowed_dot_general_body_rs (p: f32[4]) -> f32[4] {
  %g = bf16[640,480]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={0}
  %s = (bf16[640,120]{1,0}, bf16[640,120]{1,0}, u32[]) collective-permute-start(%p), channel_id=3
  %i = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  ROOT %t = (f32[4], u32[]) tuple(%p, %next)
}
%condition (p: f32[4]) -> pred[] {
  %n = s32[] constant(12)
  %i = u32[] get-tuple-element(%p), index=1
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), condition=%condition, body=%windowed_dot_general_body_rs
  %again = bf16[640,480]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %u = f32[640,480]{1,0} dynamic-update-slice(%p, %p)
  %r = (f32[640,480]{1,0}, f32[2,64,640]{2,1,0}, f32[]) all-reduce(%u, %w, %p), channel_id=2
}
"""
    found = tpu_compile.collectives(hlo)
    assert found == [
        ("all-gather", "bf16", [640, 480], 6, True),
        ("collective-permute", "bf16", [640, 120], 6, False),
        ("all-reduce", "f32", [640, 480], 1, True), ("all-reduce", "f32", [2, 64, 640], 1, False),
        ("all-reduce", "f32", [], 1, False)]
    program = dict(chips=4, shapes=[[480, 640]], depths=[], heads=[(3, 160)])
    kinds = [tpu_compile.kind_of(shape, gathers, program) for _, _, shape, _, gathers in found]
    assert kinds == ["weight", "gradient", "weight", "activation", "small"]
    assert tpu_compile.kind_of([3, 160, 640], True, program) == "weight"
