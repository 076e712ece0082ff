"""From a graph to the layers in it: one `Layer` for each unique weight, with what can be done to it or the reason why nothing can.

`uses` follows weights that are read as tensors, `selection` knows the rules and the user's selectors, `stacks` groups layers alike,
`adapters` knows what is left alone beside a model's own layers.
May import: errors, model, pairs, torch_private, tracing.
Start reading: layer.py, then discover.py.
"""
