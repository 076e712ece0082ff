"""Where things lie in the repository."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
RUNS = SUPPORT / "runs"
TESTS = SUPPORT.parent
DATA = TESTS / "data"
ROOT = TESTS.parent
PYTHONPATH = os.pathsep.join(map(str, (SUPPORT, RUNS, ROOT)))
"""For processes of a test's own that import what tests share."""
