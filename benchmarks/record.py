"""Where a number comes from: hardware, versions, configuration and command, written beside it."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

import fxrank

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, and the command as typed with file names for paths."""
    command = [Path(a).name if os.sep in a else a for a in sys.argv]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "fxrank": fxrank.__version__,
        "date": f"{datetime.now(UTC):%Y-%m}",
        "command": " ".join(command),
    }


def place(name: str, found: dict[str, Any], folder: str | Path | None = None, ending: str = "json") -> Path:
    """`<name>_<hardware>_<yyyymm>.json` of an environment."""
    hardware = f"cpu{os.cpu_count()}" if found["gpu"] is None else found["gpu"].lower().replace("nvidia", "").split()[0]
    return (
        RESULTS if folder is None else Path(folder)
    ) / f"{name}_{hardware}_{found['date'].replace('-', '')}.{ending}"


def path_of(name: str, device: torch.device, folder: str | Path | None = None) -> Path:
    """`<name>_<hardware>_<yyyymm>.json` in `folder` (default benchmarks/results)."""
    found = environment(device)
    hardware = f"cpu{os.cpu_count()}" if found["gpu"] is None else found["gpu"].lower().replace("nvidia", "").split()[0]
    target = RESULTS if folder is None else Path(folder)
    return target / f"{name}_{hardware}_{found['date'].replace('-', '')}.json"


def write(name: str, data: dict[str, Any], *, device: torch.device, folder: str | Path | None = None) -> Path:
    """Write `path_of` with the environment and `data`; returns its path."""
    path = path_of(name, device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(device)} | data
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    return path


class Ledger:
    """Rows in a file as they come, one a line, with the configuration that they were made with; those of another are not looked at, and the
    last of a name counts. A last line that was cut off, as by a kill, counts for nothing.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        self._path, self._configuration = path, json.loads(json.dumps(configuration))
        self._rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._cut = not text.endswith("\n") and bool(text)
        for line in text[: text.rfind("\n") + 1].splitlines():
            entry = json.loads(line)
            if entry["configuration"] == self._configuration:
                self._rows[json.dumps(entry["name"])] = entry["name"], entry["found"]

    def found(self, name: dict[str, Any]) -> dict[str, Any] | None:
        """What is known of this row; None if there is none."""
        row = self._rows.get(json.dumps(name))
        return None if row is None else row[1]

    def add(self, name: dict[str, Any], found: dict[str, Any], shown: bool = True) -> None:
        """Write a row at once, and print it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"configuration": self._configuration, "name": name, "found": found}) + "\n"
        if self._cut:
            content = self._path.read_bytes()
            self._path.write_bytes(content[: content.rfind(b"\n") + 1])
            self._cut = False
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._rows[json.dumps(name)] = name, found
        if shown:
            print(name | found, flush=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All of them."""
        return [name | found for name, found in self._rows.values()]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
