"""A method's file is mostly mathematics: short, and nobody else's."""

import statistics
from pathlib import Path

import surestep

FILES = sorted(Path(surestep.methods.__file__).parent.glob("[a-z]*.py"))


def code(path):
    """Return the lines of a file that are logic: no blanks, imports, comments, strings, numbers."""
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    inside = False
    for line in lines:
        quotes = line.count('"""')
        text = inside or quotes
        inside ^= quotes == 1
        if text or not line or line.startswith(("#", "from ", "import ", "@", ")", "]", "}")):
            continue
        yield line


def test_the_median_file_is_short():
    assert statistics.median(len(p.read_text("utf-8").splitlines()) for p in FILES) < 60


def test_no_two_files_share_six_lines():
    seen = {}
    for path in FILES:
        lines = list(code(path))
        for i in range(len(lines) - 5):
            run = tuple(lines[i : i + 6])
            other = seen.setdefault(run, path)
            assert other == path, f"{path.name} repeats {other.name}:\n" + "\n".join(run)
