"""`python -m random_models SEED [SEED …]`: check these seeds, one line of JSON a model. `0:60` are the first 60."""

import json
import sys
import time
import traceback
import warnings

import torch

from random_models import check
from random_models.checking import WrongError
from random_models.model import build


def result(seed):
    """What came of one seed, as plain data: what `check` has seen, or what is wrong."""
    start = time.perf_counter()
    try:
        found = {"seed": seed} | check(seed)
    except WrongError as wrong:
        found = {"seed": seed, "failed": wrong.what, "detail": str(wrong), "parts": build(seed).names}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        found = {"seed": seed, "failed": f"{type(error).__name__} in {where}", "detail": str(error)[:300]}
        found |= {"parts": build(seed).names}
    return found | {"seconds": round(time.perf_counter() - start, 3)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for argument in sys.argv[1:]:
        first, _, end = argument.partition(":")
        for seed in range(int(first), int(end) if end else int(first) + 1):
            print(json.dumps(result(seed)), flush=True)
