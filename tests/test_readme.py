"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(("code", "output"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_the_readme_says(code, output):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output


def test_there_is_an_example_on_the_first_screen():
    assert EXAMPLES
    assert README.index("```python") < 500


def test_every_file_and_command_that_the_readme_names_exists():
    named = set(re.findall(r"`(jaxgrad/[\w/.]+|experiments/[\w/.]+)`", README))
    named |= set(re.findall(r"\./(scripts/\w+)", README))
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
