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


def write(name: str, data: dict[str, Any], *, device: torch.device, folder: str | Path | None = None) -> Path:
    """Write `<name>_<hardware>_<yyyymm>.json` with the environment and `data`; returns its path."""
    target = RESULTS if folder is None else Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    found = environment(device)
    hardware = f"cpu{os.cpu_count()}" if found["gpu"] is None else found["gpu"].lower().replace("nvidia", "").split()[0]
    path = target / f"{name}_{hardware}_{found['date'].replace('-', '')}.json"
    path.write_text(json.dumps({"environment": found} | data, indent=1, default=str) + "\n", encoding="utf-8")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
