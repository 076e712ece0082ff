"""The switch from full rank to low rank, of a model and of all that follows it: a plan applied (`sites`, `apply_plan`), the optimizer
(`optimizer`, `moments`), averages and zeros among the weights, a model tried with pairs in it first (`trial`), and what later steps add (`later_steps`, `decays`).

May import: decisions, passes, plan, torch_private, wrappers.
Start reading: sites.py, then apply_plan.py.
"""
