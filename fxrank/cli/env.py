"""What a report of a fault should say of the machine: `fxrank env`."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from fxrank._version import __version__

EXTRAS = ("figures", "zoo", "huggingface", "lightning", "export")
"""Those for users."""


def described() -> str:
    """The system, the devices, and the version of every package that fxrank works with, a line each; of one that is not installed, that."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {
        "fxrank": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads",
        "GPU": ", ".join(gpus) or "none",
    }
    try:
        lines |= {name: _version(name) for name in _packages()}
    except PackageNotFoundError:
        lines |= {
            "packages": "not known: fxrank is not installed; pip install . in its checkout",
            "torch": torch.__version__,
        }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def _packages() -> list[str]:
    """Those that fxrank needs, and those of its extras for users. Raises `PackageNotFoundError` where it is not installed."""
    found = set()
    for line in requires("fxrank") or []:
        extra = re.search(r"extra == .(\w+)", line)
        if extra is None or extra[1] in EXTRAS:
            found.add(re.match(r"[\w.-]+", line)[0])  # type: ignore[index]
    return sorted(found - {"fxrank"})


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
