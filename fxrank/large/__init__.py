"""Models that are too large to be held: what making them smaller would take, found without their weights, and doing it one weight at
a time, or, with data, one block at a time.

May import: fitting, oneshot, passes, plan, policies, saving, switch, torch_private, training, wrappers.
Start reading: stream.py.
"""
