"""Random models, and what must hold of each of them.

Start reading: `model.py`, which puts a model together of the parts in the other files; `checking.py` says what must hold. The same seed makes
the same model. A new kind of code that models have is one class with `@part` in the file of its kind. `python -m random_models 7` (with
`tests/support` on the path) checks seed 7, and prints what came of it.
"""

from random_models import asking, containers, derived, layers, modes, products, sequences, ties  # noqa: F401 (they enter their parts)
from random_models.checking import check
from random_models.drawn import PARTS
from random_models.model import build

__all__ = ["PARTS", "build", "check"]
