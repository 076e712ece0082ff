"""The switch from full rank to low rank, of a model and of all that follows it: a plan applied (`sites`, `apply_plan`), the optimizer
(`optimizer`, `moments`), averages and zeros among the weights, and what later steps add (`later_steps`, `decays`).

May import: passes, plan, torch_private, wrappers.
Start reading: sites.py, then apply_plan.py.
"""
