"""What is known of a user's model without a graph: names, weights, calls, what is compiled, and how it is put back.

Nothing here knows of pairs.
May import: errors, torch_private.
Start reading: weights.py and names.py.
"""
