"""The README keeps its word: every file and function that it names exists, and its example runs."""
import ast
import doctest
import re
from pathlib import Path

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


def test_every_file_named_exists():
    for file in re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \| [^|]+ \|$", README, re.M):
        for name in re.findall(r"`([\w.]+)`", file):
            assert (ROOT / name).exists(), name


def test_the_examples_print_what_they_say():
    blocks = re.findall(r"```python\n(>>> .*?)```", README, re.S)
    assert blocks
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
        assert doctest.DocTestRunner().run(test).failed == 0
