"""What the two pages say is what the files say: tables, links, commands and the example."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]
TEXT = PAGES[0].read_text(encoding="utf-8")


def test_generated_parts_are_what_would_be_written_again():
    check = [sys.executable, ROOT / "results" / "figures.py", "--check"]
    assert subprocess.run(check).returncode == 0


def test_the_example_is_the_one_that_a_test_runs():
    shown = re.search(r"<!-- example -->\n```python\n(.*?)```", TEXT, re.S)[1]
    assert shown == (ROOT / "tests" / "examples" / "planted.py").read_text(encoding="utf-8")


def test_every_difference_has_its_line():
    """As many marks as the list has points, give or take those that share one."""
    part = TEXT[TEXT.index("## Where we differ"):TEXT.index("## Troubles")]
    listed = part.count("\n- ")
    marks = 0
    for name in ("blockprune.py", "bert.py", "train_squad.py", "compact.py", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        marks += text.count("Differs:") - text.count("`# Differs:`")
    assert listed == 8
    assert marks >= listed


@pytest.mark.parametrize("page", PAGES, ids=["README.md", "results/README.md"])
def test_files_linked_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w./-]+?)(?:#L\d+)?\)", text)
    assert links
    for link in links:
        assert (page.parent / link).exists(), link


def test_make_targets_named_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    )make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", PAGES, ids=["README.md", "results/README.md"])
def test_lines_are_at_most_100_columns(page):
    """But for tables and what is made from files."""
    text = page.read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- [\w-]+ -->\n.*?<!-- end -->", "", text, flags=re.S)
    for line in by_hand.splitlines():
        assert len(line) <= 100 or line.startswith("|"), line
