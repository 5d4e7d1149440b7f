"""What README.md says is what the files say: its tables are made from results/, its example runs, its commands are there."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_tables_and_places_are_what_would_be_written_again():
    assert subprocess.run([sys.executable, ROOT / "results" / "figures.py", "--check"]).returncode == 0


def test_the_example_is_the_one_that_a_test_runs():
    shown = re.search(r"<!-- example -->\n```python\n(.*?)```", TEXT, re.S)[1]
    assert shown == (ROOT / "tests/examples/planted.py").read_text()


def test_every_difference_has_its_line():
    """As many marks as the list has points, give or take those that share one."""
    listed = TEXT[TEXT.index("## Where we differ"):TEXT.index("## What is left out")].count("\n- ")
    marks = sum((ROOT / name).read_text().count("Differs:") - (ROOT / name).read_text().count("`# Differs:`")
                for name in ("blockprune.py", "bert.py", "train_squad.py", "compact.py", "Makefile"))
    assert listed == 8 and marks >= listed


def test_files_linked_and_make_targets_named_are_there():
    for link in re.findall(r"\]\(([\w./-]+?)(?:#L\d+)?\)", TEXT):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert len(TEXT.splitlines()) <= 320
