"""Models that are too large to be held: what making them smaller would take, found without their weights, and doing it one weight at
a time.

May import: fitting, oneshot, passes, plan, saving, switch.
Start reading: stream.py.
"""
