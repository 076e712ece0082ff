"""What is published: an sdist and a wheel that hold the package and nothing else, say what they are, and run where they are installed."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from places import ROOT

import fxrank

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(command, **options):
    """What the command prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source, folder):
    """Built with what is installed here, and without a network."""
    run([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel):
    """Of the files, but for those that describe the wheel."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("fxrank-")}


@pytest.fixture(scope="module")
def tracked():
    """The files of the repository, as git knows them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    return set(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def package(tracked):
    """Those of the package."""
    return {name for name in tracked if name.startswith("fxrank/")}


@pytest.fixture(scope="module")
def source(tracked, tmp_path_factory):
    """A copy of the repository without links: `passes` on top is a file, as git checks one out with core.symlinks=false."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked - {"passes"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "passes").write_text("fxrank/passes")
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", program], cwd=source)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """From the sdist, as whoever installs one builds it."""
    return wheel_of(sdist, tmp_path_factory.mktemp("wheel"))


def test_an_sdist_has_the_package_and_what_builds_it(sdist, package):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if not name.startswith("fxrank.egg-info/")}
    beside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert names == package | beside


def test_a_wheel_has_every_file_of_the_package_and_no_other(wheel, package):
    """No tests, benchmarks or examples, nor the link on top; with the mark that it is typed, and the licence."""
    assert names_in(wheel) == package
    assert "fxrank/py.typed" in package
    assert any(name.endswith("/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_a_wheel_from_a_zip_of_the_repository_has_every_file(tmp_path, tracked):
    archive = tmp_path / "source.zip"
    run(["git", "archive", "--format=zip", f"--output={archive}", "HEAD"], cwd=ROOT)
    zipfile.ZipFile(archive).extractall(tmp_path / "source")  # Python makes a file of a link, as Windows does
    assert not (tmp_path / "source" / "passes").is_dir()
    assert names_in(wheel_of(tmp_path / "source", tmp_path / "wheels")) == {
        name for name in zipfile.ZipFile(archive).namelist() if name.startswith("fxrank/") and not name.endswith("/")
    }


def test_the_metadata_say_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Version"] == fxrank.__version__
    assert metadata["License-Expression"] == "MIT" and metadata["License-File"] == "LICENSE"
    classifiers = metadata.get_all("Classifier")
    assert classifiers == project["classifiers"]
    groups = {classifier.partition(" :: ")[0] for classifier in classifiers}
    # PEP 639: beside the expression there is no classifier of the licence
    assert groups == {"Development Status", "Intended Audience", "Programming Language", "Topic", "Typing"}
    oldest = metadata["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in classifiers
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert urls == project["urls"] and urls.keys() >= {"Homepage", "Documentation", "Changelog"}
    assert all(url.startswith("https://") for url in urls.values())
    assert set(metadata.get_all("Provides-Extra")) == project["optional-dependencies"].keys()


def test_it_runs_where_it_is_installed(wheel, tmp_path):
    """Without the repository on the path."""
    place = tmp_path / "installed"
    run([*PIP, "install", "--no-compile", "--no-deps", "--no-index", "--target", str(place), str(wheel)])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(place)}
    elsewhere = {"cwd": tmp_path, "env": environment}
    program = "import fxrank, fxrank.passes; print(fxrank.__file__, fxrank.passes.__file__, sep='\\n')"
    for file in run([sys.executable, "-c", program], **elsewhere).splitlines():
        assert Path(file).is_relative_to(place)
    assert run([place / "bin/fxrank", "--version"], **elsewhere) == f"fxrank {fxrank.__version__}\n"


def test_what_publishes_it_finds_nothing_wrong(sdist, wheel):
    pytest.importorskip("twine", reason="twine, of the extra dev, is not installed")
    run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)])


def test_its_contents_are_those_of_a_package(wheel):
    pytest.importorskip("check_wheel_contents", reason="check-wheel-contents, of the extra dev, is not installed")
    run([sys.executable, "-m", "check_wheel_contents", str(wheel)])


def test_the_usual_front_end_builds_the_same(source, sdist, wheel, tmp_path):
    pytest.importorskip("build.__main__", reason="build, of the extra dev, is not installed")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)])
    assert {path.name for path in tmp_path.iterdir()} == {sdist.name, wheel.name}
    assert names_in(tmp_path / wheel.name) == names_in(wheel)
