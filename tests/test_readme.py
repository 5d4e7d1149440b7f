"""README.md and results/README.md name what exists: files, code, commands, the example."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "results/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_files_linked_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_programs_and_targets_of_commands_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for program in re.findall(r"python3? ([\w/]+\.py)", text):
        assert (ROOT / program).exists(), program
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    )make ([a-z]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_code_in_the_map_is_where_it_says():
    """[`name`](file.py) is defined there; with #L10, in line 10."""
    places = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)(?:#L(\d+))?\)", README)
    assert len(places) > 10
    for name, file, line in places:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        if line:
            lines = lines[int(line) - 1:int(line)]
        assert any(re.match(rf"(def|class) {name}\b", text) for text in lines), (name, file, line)


def test_the_example_shown_is_planted_py():
    """From its imports on; above these it says where the root is, for those who run it there."""
    shown = re.search(r"<!-- example -->\n```python\n(.*?)```", README, re.S)[1]
    planted = (ROOT / "tests" / "examples" / "planted.py").read_text(encoding="utf-8")
    assert shown == planted[planted.index("import torch\n"):]
