"""The documents: links, files, symbols and flags exist, and the diffs of docs/forking.md work.

    pytest tests/test_docs.py
"""
import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from training import save_captioned                                      # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tiny/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
EACH = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


def code_blocks(text):
    """Return the text of the indented and fenced blocks, with continued lines joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^ {4,}\S.*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return re.sub(r"\\\n\s*", " ", "\n".join([*fenced, *indented]))


def commands(text):
    """Return (script, words) of each call of a script of ours in a block or a code span."""
    spans = re.findall(r"`((?:python )?[\w/]+\.py [^`]*)`", re.sub(r"\s+", " ", text))
    lines = [*code_blocks(text).splitlines(), *spans]
    calls = re.compile(r"(?:^|\s)(?:python |torchrun .*?|)((?:tiny/|tests/)?\w+\.py)((?:\s[^;|&#]*)?)")
    return [(m[1], m[2].split()) for line in lines for m in calls.finditer(line.split(" # ")[0])]


@functools.cache
def known_flags(script, subcommand=None):
    """Return the flags in a script's help. In this process: to start each script takes seconds."""
    words, said = [subcommand, "--help"] if subcommand else ["--help"], io.StringIO()
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(said):
        m.setattr(sys, "argv", [script, *words])
        m.syspath_prepend(ROOT)
        with pytest.raises(SystemExit):
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    return set(re.findall(r"--[a-z][a-z0-9-]*", said.getvalue()))


@functools.cache
def symbols(file):
    """Return every name that a file defines: functions, classes, methods and module constants."""
    found = set()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + child.name)
                visit(child, prefix + child.name + ".")
            elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update(prefix + n.id for t in targets for n in ast.walk(t)
                             if isinstance(n, ast.Name))
            else:
                visit(child, prefix)

    visit(ast.parse((ROOT / file).read_text()), "")
    return found


def slug(title):
    return re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_image_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", file.read_text(), re.M)), target


@EACH
def test_every_named_file_and_symbol_exists(page):
    """`file.py`, `folder/file.md` and `file.py:name` in code spans."""
    for file, name in re.findall(r"`((?:tiny/|tests/|docs/)?\w+\.(?:py|md))(?::([\w.]+))?`",
                                 page.read_text()):
        place = next((p for p in (ROOT / file, page.parent / file) if p.is_file()), None)
        assert place, file
        if name:
            assert name in symbols(file), f"{file}:{name}"


METHOD = ("flow", "dit", "text_model", "encoder", "decoder", "losses", "train_decoder", "train_dit",
          "sample", "best_of")


@pytest.mark.parametrize("file", METHOD)
def test_the_paper_s_page_leads_into_each_file_of_the_method(file):
    """That the symbol exists is checked above."""
    assert f"`{file}.py:" in (ROOT / "docs/paper.md").read_text()


@EACH
def test_every_flag_is_known(page):
    """Flags that only a diff of the page adds need no exception: none adds one."""
    for script, words in commands(page.read_text()):
        assert (ROOT / script).is_file(), script
        flags = {w.strip("\"',.()").split("=")[0] for w in words if w.startswith("--")}
        if not flags or script.startswith("tests/test_"):
            continue
        sub = words[0] if script in ("evaluate.py", "data.py") else None
        known = known_flags(script, sub)
        if script == "tests/tpu_compile.py":            # its help says so
            known = known | known_flags("train_dit.py")
        assert flags <= known, (script, sorted(flags - known))


def test_commands_are_found():
    """The two commands for a first image and a first training are in the README."""
    found = commands((ROOT / "README.md").read_text())
    assert ("train_dit.py", []) in found
    assert any(script == "sample.py" and "--grid" in words for script, words in found)
    assert {"evaluate.py", "data.py"} <= {script for script, _ in found}


def test_lines_that_make_the_images(tmp_path):
    """The Python lines of docs/tiny.md run; grey images stand in for drawn ones."""
    flags, sheets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tiny.md").read_text(), re.S)

    def run(*args):
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True,
                              env={**ENV, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-c", flags)
    assert run(ROOT / "data.py", "check", "flags") == "0 of 12 records are broken\n"
    for folder in ("drawn", "before", "after", "runs/dit-tiny/samples", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    grey = Image.new("RGB", (64, 64), "grey")
    for i in range(16):
        grey.save(tmp_path / f"drawn/{i:05d}-0.png")
        grey.save(tmp_path / f"before/{i}-0.png")
        grey.save(tmp_path / f"after/{i}-0.png")
    for step in (300, 600, 900, 1800):
        path = tmp_path / f"runs/dit-tiny/samples/step-{step:07d}.png"
        save_captioned(torch.full((16, 3, 64, 64), 0.5), ["a prompt"] * 16, path)
    run("-c", sheets)
    for name in ("samples", "finetune", "training"):
        assert Image.open(tmp_path / f"docs/{name}.png").size == \
            Image.open(ROOT / f"docs/{name}.png").size
    first = np.asarray(Image.open(tmp_path / "docs/training.png"))[8:272, 8:272]    # 16 images
    grey = np.full((64, 64, 3), 128)
    assert all((first[y:y + 64, x:x + 64] == grey).all()
               for y in range(2, 264, 66) for x in range(2, 264, 66))


def test_the_readme_lists_every_file():
    text = (ROOT / "README.md").read_text()
    assert [p.name for p in ROOT.glob("*.py") if f"`{p.name}`" not in text] == []


def test_the_notebook_s_contents_list_every_entry():
    head, *entries = (ROOT / "LOG.md").read_text().split("\n## ")
    titles = [entry.split("\n")[0] for entry in entries]
    assert re.findall(r"\(#(.*?)\)", head) == [slug(title) for title in titles]


def test_the_draws_of_the_porting_page():
    """Each line prints what its comment says."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/porting.md").read_text(), re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == re.findall(r"# (.*)$", code, re.M), done.stderr


def experiments():
    sections = (ROOT / "docs/forking.md").read_text().split("\n## ")[1:]
    return [pytest.param(*re.search(r"```diff\n(.*?)```\n(.*)", s, re.S).groups(),
                         id=s.split("\n")[0]) for s in sections]


@pytest.mark.slow
@pytest.mark.parametrize("diff, rest", experiments())
def test_forks(diff, rest, tmp_path):
    """Each diff applies, and the commands under it run."""
    copy = tmp_path / "fork"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "tests", "runs", "weights", "results", "*.egg-info"))
    done = subprocess.run(["git", "apply", "-C1", "-"], input=diff, cwd=copy, text=True,
                          capture_output=True, env={**ENV, "GIT_CEILING_DIRECTORIES": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^    python (.*)$", rest, re.M)
    assert any(line.startswith("train_dit.py") for line in lines)
    for line in lines:
        done = subprocess.run([sys.executable, *shlex.split(line)], cwd=copy, env=ENV,
                              capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (copy / "runs/dit-tiny/final/model.safetensors").is_file()
