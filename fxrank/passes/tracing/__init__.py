"""Model and one example call → graphs in which every node knows its value's shape and dtype: the tracer (`tracer`) with its
proxies, what stands in for Python's and torch's functions meanwhile and in whose thread (`patches`, `one_thread`), the values
without data (`fake_values`), and the proof that a graph computes what its model does (`proof`, `compare`).

May import: errors, model, pairs, torch_private.
Start reading: trace.py.
"""
