"""The engine in anybody's training loop: what is examined at attach, the hooks on the optimizers, the switch, and the state
that a session is stored as.

May import: decisions, distributed, fitting, loggers, passes, plan, policies, switch, torch_private, wrappers.
Start reading: session.py.
"""
