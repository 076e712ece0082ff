"""The training loop behind `auto_lowrank`: its options, what steps the weights, where a run is, and what it reports.

The loop deals its batches through a `Keeper`, which keeps nothing here; the one that writes checkpoints is in `resume`.
May import: distributed, loggers, page, passes, plan, policies, session, torch_private.
Start reading: trainer.py.
"""
