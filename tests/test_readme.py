"""The README keeps its word: every file and function that it names exists, and its example runs."""
import ast
import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import generate
import sds
import train
from test_sources import write_object

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def names(path):
    """'function', 'Class' and 'Class.method' of a source file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def test_the_table_from_paper_to_code():
    rows = re.findall(r"^\|[^|]+\| `(\w+\.py)` \| (.+) \|$", README, re.M)
    assert len(rows) >= 16
    for file, places in rows:
        for place in re.findall(r"`([\w.]+)`", places):
            assert place in names(ROOT / file), f"{file} has no {place}"


def test_the_table_of_files():
    rows = re.findall(r"^\| `([\w.]+)` \| [^|]+ \| (\d+) \|$", README, re.M)
    sources = [f for ending in ("*.py", "*.cu", "toy_world.txt") for f in ROOT.glob(ending)]
    assert {name for name, _ in rows} == {file.name for file in sources}
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name
        assert int(lines) <= 500, name


def commands():
    """Every command of the README that runs a program of ours, as a list of words."""
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    for line in re.findall(r"^(?:.*&& )?python (.+)$", "\n".join(blocks), re.M):
        yield shlex.split(line.replace(" [--views-only]", " --views-only"), comments=True)
    for line in re.findall(r"`python ([^`]+)`", README):
        yield shlex.split(line)


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_is_one(words, tmp_path):
    """The programs' own parsers take it; what it does is run by the other tests."""
    program, *rest = words
    (tmp_path / "MODEL").mkdir()
    rest = [str(tmp_path / "MODEL") if w in ("FOLDER_OR_FILE", "SD21", "MVDREAM") else w for w in rest]
    if program == "generate.py":
        assert generate.parse([*rest, "--out", str(tmp_path / "out")]).prompts
    elif program == "train.py":
        assert train.parse([*rest, "--device", "cpu"]).steps > 0
    elif program == "tests/benchmark.py":
        source = (ROOT / "tests" / f"benchmark_{rest[0]}.py").read_text()
        for flag in [w for w in rest if w.startswith("--")]:
            assert f'"{flag}"' in source or hasattr(sds.Settings(), flag[2:]), flag
    else:
        assert program == "-m" or (ROOT / program).exists()


def test_the_first_command_makes_what_the_readme_says(tmp_path):
    """In few steps: else it is word for word what a newcomer types."""
    words = next(w for w in commands() if w[0] == "generate.py")
    done = subprocess.run([sys.executable, *words, "--steps", "10", "--out", str(tmp_path)], cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = re.search(r"writes into `outputs/([^/]+)/`: (.+?)\. The second", README, re.S)
    named = re.findall(r"`([\w.]+)`", folder[2])
    assert sorted(named) == sorted(file.name for file in (tmp_path / folder[1]).iterdir())


def test_data_of_ones_own_is_checked(tmp_path):
    for i in range(2):
        write_object(tmp_path / "renders" / f"{i}")
    done = subprocess.run([sys.executable, ROOT / "data.py", "renders/"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "renders: 2 objects; nothing amiss" in done.stdout
    assert (tmp_path / "outputs" / "data.png").exists()


def test_the_examples_print_what_they_say():
    blocks = re.findall(r"```python\n(>>> .*?)```", README, re.S)
    assert blocks
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
        assert doctest.DocTestRunner().run(test).failed == 0
