"""The rooms of the package: each says what it holds and imports what it says, and the arrows from a run down to the policies
run one way.
"""

import ast
import re
from pathlib import Path

import networkx as nx
import pytest

import fxrank

ROOT = Path(fxrank.__file__).parent
ROOMS = ["policies", "session", "training", "resume", "integrations", "cli"]


def text_of(room):
    return ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))


def imports_of(room):
    """What files of the room import, as the room or the file on top in which it lies."""
    found = set()
    for path in (ROOT / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name and name.startswith("fxrank.")}
    return found - {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_holds_and_imports_what_it_says(room):
    text = text_of(room)
    named = re.search(r"^May import: (.*)\.$", text, re.MULTILINE)[1].split(", ")
    assert set(named) == imports_of(room) and named == sorted(named)
    assert (ROOT / room / re.search(r"^Start reading: (\S+)\.$", text, re.MULTILINE)[1]).is_file()
    assert 3 <= len(text.splitlines()) <= 6
    assert len(ast.parse((ROOT / room / "__init__.py").read_text()).body) == 1  # no code


def test_arrows_between_these_rooms_run_one_way():
    graph = nx.DiGraph((room, other) for room in ROOMS for other in imports_of(room) & {*ROOMS})
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)
    order = list(nx.topological_sort(graph))
    assert order.index("resume") < order.index("training") < order.index("session") < order.index("policies")
