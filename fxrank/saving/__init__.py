"""What is written and read: a model with its plan (`model_files`, in several files `shards`), plain data and tensors in one file (`plainfile`), and the state
of all random numbers (`random_state`). Nothing is pickled.

May import: distributed, passes, plan, switch, torch_private.
Start reading: model_files.py.
"""
