"""A run that may be killed and goes on: its checkpoint, what must be the same in the run that goes on from it, and how
several processes share one file.

May import: distributed, passes, plan, policies, saving, session, switch, torch_private, training.
Start reading: keeper.py.
"""
