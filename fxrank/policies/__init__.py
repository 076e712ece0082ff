"""Who decides E, K and R, and from what: policies, rank curves, rank rules.

A policy answers what the engine asks (`base.py`), of what it may look at (`scene.py`).
May import: decisions, passes, plan, switch, torch_private.
Start reading: base.py.
"""
