"""Factor pairs: the modules that take a dense layer's place, one class for each kind and form, and the registry of them.

A pair that is read as a weight multiplies through its factors (`reading`).
May import: errors, model, spectra, torch_private.
Start reading: base.py; linear.py is the simplest pair.
"""

# Importing the room registers them, in the order in which messages list them.
from fxrank.passes.pairs import linear, convolution, embedding, parameter, gauge  # isort: skip  # noqa: F401
