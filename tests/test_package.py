"""The folder `passes/`: one name for every class, and arrows that run one way."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import networkx as nx
import pytest

import fxrank
import fxrank.passes

ROOT = Path(fxrank.__file__).parent
PASSES = sorted(p.stem for p in (ROOT / "passes").glob("*.py") if p.stem != "__init__")
PRODUCT = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (".", "distributed", "integrations", "optim", "policies")
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in ("__init__", "__main__")
)
FOLDERS = {name.partition(".")[0] for name in PRODUCT if "." in name}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports depend on the name a file is imported under"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_the_folder_on_top_is_a_relative_link_to_the_real_one():
    link = ROOT.parent / "passes"
    assert not (ROOT / "passes").is_symlink() and (ROOT / "passes" / "__init__.py").is_file()
    if link.is_symlink():  # not so in an installed package, nor in a clone without symbolic links
        assert link.readlink() == Path("fxrank/passes")


def wheel_of(source, scratch):
    """The names of the files in a wheel built from a folder, which is then installed into an empty one and imported there."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(scratch / "wheels"), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = (scratch / "wheels").glob("*.whl")
    place = scratch / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)], check=True)
    program = f"import fxrank.passes; assert fxrank.passes.__file__.startswith({str(place)!r}), fxrank.passes.__file__"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(place)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=scratch, env=environment, timeout=300)
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(("fxrank/", "passes"))}


@pytest.fixture(scope="module")
def tracked():
    """The files of the package, as the repository has them."""
    listed = subprocess.run(["git", "ls-files", "fxrank"], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    return set(listed.stdout.split())


def test_a_wheel_from_a_zip_of_the_repository_has_every_file(tmp_path, tracked):
    archive = tmp_path / "source.zip"
    subprocess.run(["git", "archive", "--format=zip", f"--output={archive}", "HEAD"], cwd=ROOT.parent, check=True)
    zipfile.ZipFile(archive).extractall(tmp_path / "source")  # Python makes a file of a link, as Windows does
    assert not (tmp_path / "source" / "passes").is_dir()
    assert wheel_of(tmp_path / "source", tmp_path) == {
        name for name in zipfile.ZipFile(archive).namelist() if name.startswith("fxrank/") and not name.endswith("/")
    }


def test_a_wheel_from_a_copy_without_links_has_every_file(tmp_path, tracked):
    source = tmp_path / "source"
    for name in [*tracked, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT.parent / name, source / name)
    (source / "passes").write_text("fxrank/passes")  # as git checks a link out with core.symlinks=false
    assert wheel_of(source, tmp_path) == tracked


@pytest.mark.parametrize("name", PASSES)
def test_every_class_of_the_passes_is_imported_under_one_name(name):
    module = importlib.import_module(f"fxrank.passes.{name}")
    assert module.__name__ == f"fxrank.passes.{name}"
    for node in ast.parse((ROOT / "passes" / f"{name}.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            assert getattr(module, node.name).__module__ == f"fxrank.passes.{name}"
    for cls in vars(module).values():
        if inspect.isclass(cls) and "passes" in cls.__module__.split("."):
            assert cls.__module__.startswith(("fxrank.passes.", "torch."))
    assert "passes" not in sys.modules


@pytest.mark.parametrize("name", PASSES)
def test_passes_import_nothing_of_the_product(name):
    for imported in imports_of(ROOT / "passes" / f"{name}.py"):
        assert not imported.startswith("fxrank") or imported.startswith("fxrank.passes."), imported
        assert imported != "passes" and not imported.startswith("passes.")


@pytest.mark.parametrize("path", [f"{n.replace('.', '/')}.py" for n in PRODUCT] + [f"passes/{n}.py" for n in PASSES])
def test_no_module_imports_a_packages_own_init(path):
    names = {*imports_of(ROOT / path)}
    modules = {f"fxrank.{n}" for n in PRODUCT} | {f"fxrank.passes.{n}" for n in PASSES}
    assert "fxrank" not in {n for n in names if "." not in n}
    # `from fxrank.passes import spectra` names a module; anything else taken from there is the __init__'s.
    packages = {"fxrank", "fxrank.passes"} | {f"fxrank.{folder}" for folder in FOLDERS}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in packages:
            assert {f"{node.module}.{a.name}" for a in node.names} <= modules


def arrows(folder, prefix, names):
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    for name in names:
        targets = {i.removeprefix(prefix) for i in imports_of(folder / f"{name.replace('.', '/')}.py")}
        graph.add_edges_from((name, t) for t in targets & set(names))
    return graph


def test_arrows_run_one_way():
    for graph in (arrows(ROOT / "passes", "fxrank.passes.", PASSES), arrows(ROOT, "fxrank.", PRODUCT)):
        assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)
        assert graph.number_of_edges() >= len(graph) / 2  # the picture is not empty


def test_arrows_between_folders_run_one_way():
    graph = nx.DiGraph()
    for a, b in arrows(ROOT, "fxrank.", PRODUCT).edges:
        first, second = (n.partition(".")[0] for n in (a, b))
        if first != second:
            graph.add_edge(first, second)
    assert {*graph.nodes} >= FOLDERS
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)


def test_every_pass_imports_by_itself():
    """In a fresh process, in every order of first import, without the product coming along unasked for but its `__init__`."""
    program = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(f'fxrank.passes.{n}')"
    subprocess.run([sys.executable, "-W", "error", "-c", program, *reversed(PASSES)], check=True, timeout=300)


def test_the_public_names_exist_and_are_sorted():
    assert fxrank.__all__ == sorted(fxrank.__all__)
    assert all(hasattr(fxrank, name) for name in fxrank.__all__)


def test_every_module_class_and_function_of_the_passes_says_what_it_does():
    for name in PASSES:
        module = importlib.import_module(f"fxrank.passes.{name}")
        assert module.__doc__
        for attribute, thing in vars(module).items():
            if (
                (inspect.isclass(thing) or inspect.isfunction(thing))
                and thing.__module__ == module.__name__
                and not attribute.startswith("_")
            ):
                assert thing.__doc__, f"{name}.{attribute}"
