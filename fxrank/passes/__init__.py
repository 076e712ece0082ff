"""The compiler under fxrank: torch.fx graphs and weight matrices in and out. Knows nothing of training.

Its rooms, from the ground up: `errors`; `model` (what is known of a user's model without a graph) and `spectra`; `pairs`, the
modules that take a layer's place; then the four passes, `tracing`, `discovery`, `profiling` and `rewriting`.
May import: torch_private.
Start reading: tracing/trace.py, then discovery/discover.py.
"""
