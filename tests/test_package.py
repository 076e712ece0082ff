"""The house: rooms with arrows that run one way, and one name for every class."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import fxrank
import fxrank.passes

ROOT = Path(fxrank.__file__).parent
FILES = {
    ".".join(("fxrank", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.stem != "__init__"
}
"""Every module but the rooms' faces, by its name."""
PASSES = {name: path for name, path in FILES.items() if name.startswith("fxrank.passes.")}
ROOMS = {".".join(("fxrank", *p.parent.relative_to(ROOT).parts)): p for p in sorted(ROOT.rglob("__init__.py"))}
"""Every folder, by its name, with its `__init__`."""


def imports_of(path):
    """The modules that a file imports, by name; of `from room import file` the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports depend on the name a file is imported under"
            names = {f"{node.module}.{a.name}" for a in node.names}
            yield from names & FILES.keys() or {node.module}
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def room_of(module):
    """The room as others call it: inside `passes` and outside of it, the next part of the name."""
    first, _, rest = module.removeprefix("fxrank.").partition(".")
    return f"passes.{rest.partition('.')[0]}" if first == "passes" and rest else first


def arrows(rooms):
    """What imports what: files, or rooms."""
    graph = nx.DiGraph()
    for name, path in FILES.items():
        a = room_of(name) if rooms else name
        graph.add_node(a)
        for imported in imports_of(path):
            if imported in FILES:
                b = room_of(imported) if rooms else imported
                if a != b:
                    graph.add_edge(a, b)
    return graph


# -- arrows


@pytest.mark.parametrize("rooms", [False, True], ids=["files", "rooms"])
def test_arrows_run_one_way(rooms):
    graph = arrows(rooms)
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)
    assert graph.number_of_edges() >= 2 * len(graph)  # the picture is not empty


def test_the_passes_import_nothing_of_the_product():
    for name, path in PASSES.items():
        for imported in imports_of(path):
            if imported.startswith("fxrank"):
                assert imported.startswith(("fxrank.passes.", "fxrank.torch_private.")), (name, imported)
            assert imported != "passes" and not imported.startswith("passes."), (name, imported)


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"fxrank"}))
def test_a_rooms_face_says_what_it_may_import_and_where_to_start(room):
    """In three to six lines; what it may import is what its files do import."""
    face = ROOMS[room]
    text = ast.get_docstring(ast.parse(face.read_text()))
    lines = [line for line in text.splitlines() if line]
    assert 3 <= len(lines) <= 6, lines
    stated = re.search(r"^May import: ([^.]*(?:\n[^.]*)?)\.$", text, re.MULTILINE)
    files = [path for path in FILES.values() if path.parent == face.parent]
    if room == "fxrank.passes":
        files = list(PASSES.values())
    found = {room_of(i) for path in files for i in imports_of(path) if i in FILES}
    if room.startswith("fxrank.passes"):
        names = {r.removeprefix("passes.") for r in found}
    else:
        names = {r.partition(".")[0] for r in found}
    own = {room.rpartition(".")[2]} if room != "fxrank.passes" else {n for n in names if n != "torch_private"}
    assert set(re.split(r",\s*", stated[1])) - {"nothing"} == names - own
    start = re.search(r"^Start reading: (.*)\.$", text, re.MULTILINE)[1]
    for file in re.findall(r"[\w/]+\.py", start):
        assert (face.parent / file).is_file(), file


def test_no_module_imports_a_rooms_face():
    """Only `import fxrank` of a user does: the face of all. `from fxrank.passes.pairs import linear` names a module."""
    for name, path in FILES.items():
        if name not in ("fxrank.demo",):
            assert not set(imports_of(path)) & ROOMS.keys(), name


def test_no_file_and_no_room_is_too_large():
    for name, path in FILES.items():
        assert len(path.read_text().splitlines()) <= 400, name
    for room, face in ROOMS.items():
        assert len(list(face.parent.glob("*.py"))) <= 13, room  # twelve and the face


# -- names


@pytest.mark.parametrize("name", PASSES)
def test_every_class_of_the_passes_is_imported_under_one_name(name):
    module = importlib.import_module(name)
    assert module.__name__ == name
    for node in ast.parse(PASSES[name].read_text()).body:
        if isinstance(node, ast.ClassDef):
            assert getattr(module, node.name).__module__ == name
    for cls in vars(module).values():
        if inspect.isclass(cls) and "passes" in cls.__module__.split("."):
            assert cls.__module__.startswith(("fxrank.passes.", "torch."))
    assert "passes" not in sys.modules


def test_every_pass_imports_by_itself():
    """In a fresh process, in every order of first import, without the product coming along unasked for but its `__init__`."""
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    subprocess.run([sys.executable, "-W", "error", "-c", program, *reversed(PASSES)], check=True, timeout=300)


def test_the_public_names_exist_and_are_sorted():
    assert fxrank.__all__ == sorted(fxrank.__all__)
    assert all(hasattr(fxrank, name) for name in fxrank.__all__)


def test_every_module_class_and_function_of_the_passes_says_what_it_does():
    for name in PASSES:
        module = importlib.import_module(name)
        assert module.__doc__
        for attribute, thing in vars(module).items():
            if (
                (inspect.isclass(thing) or inspect.isfunction(thing))
                and thing.__module__ == module.__name__
                and not attribute.startswith("_")
            ):
                assert thing.__doc__, f"{name}.{attribute}"


# -- the folder on top


def test_the_folder_on_top_is_a_relative_link_to_the_real_one():
    link = ROOT.parent / "passes"
    assert not (ROOT / "passes").is_symlink() and (ROOT / "passes" / "__init__.py").is_file()
    if link.is_symlink():  # not so in an installed package, nor in a clone without symbolic links
        assert link.readlink() == Path("fxrank/passes")
