"""What an adapter's file and flags say of themselves."""

import ast
import importlib.util
import re
from dataclasses import fields, is_dataclass

import pytest

from samtune import config
from samtune.adapters import ADAPTERS

ARXIV = re.compile(r"arXiv\s(\d{4}\.\d{5})")
REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)\s([0-9a-f]{7,40})\b")
OPTIONS = [row.options for row in ADAPTERS.values()]
OPTIONS += [v for n, v in vars(config).items() if is_dataclass(v) and n.endswith("Options")]


def header(name: str) -> str:
    """The docstring of the adapter's file, which is not imported."""
    path = importlib.util.find_spec(ADAPTERS[name].module).origin
    with open(path) as file:
        return ast.get_docstring(ast.parse(file.read()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_header_names_paper_repository_commit_and_deviations(name):
    """The very ones of its row in the table, in both directions."""
    text, source = header(name), ADAPTERS[name].source
    assert set(ARXIV.findall(text)) == set(ARXIV.findall(source)) != set()
    assert set(REPOSITORY.findall(text)) == set(REPOSITORY.findall(source)) != set()
    deviations = re.search(r"^Deviations?: (.*)", text, re.M | re.S)
    assert deviations and len(deviations.group(1)) > 40


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.__name__)
def test_every_option_says_what_it_does(options):
    assert options.__doc__
    for f in fields(options):
        assert len(f.metadata["help"].strip()) > 5, f"--{f.name} has no help"
        choices = f.metadata["choices"] or ()
        assert not choices or f.default in choices, f.name
