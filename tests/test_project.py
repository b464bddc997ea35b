"""Files that must agree: README and catalogue, Binder and constraints, ranges and the tested set."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from notebook_kit.jupyter.cli import END, START, methods_table

ROOT = Path(__file__).parents[1]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
PINS = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_readme_lists_every_method():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.split(START)[1].split(END)[0].strip() == methods_table(), "run `make readme`"


def test_readme_shows_files_that_exist():
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf-8")):
        if "://" not in link:
            assert (ROOT / link).exists(), link


def test_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(blocks[0], names)
    assert names["result"].best["density"] in (0.2, 0.5, 1.0)


@pytest.mark.parametrize(
    "line",
    [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)],
)
def test_tested_set_lies_within_the_ranges(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(PINS[requirement.name.lower().replace("_", "-")])


def test_binder_agrees_with_the_project():
    environment = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())
    pins = dict(line.split("=") for line in environment["dependencies"] if isinstance(line, str) and "=" in line)
    assert pins["pytorch-cpu"] == PINS["torch"]
    low, high = re.findall(r"3\.\d+", PROJECT["requires-python"])
    minor = int(pins["python"].split(".")[1])
    assert int(low.split(".")[1]) <= minor < int(high.split(".")[1])
    assert '-c constraints.txt -e ".[lab]"' in (ROOT / "binder" / "postBuild").read_text()


def test_no_built_or_huge_file_is_in_the_package():
    for path in (ROOT / "notebook_kit").rglob("*"):
        assert path.stat().st_size < 3_000_000, path
