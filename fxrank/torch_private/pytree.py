"""Nests of containers with tensors in them. Torch's own functions for them, which know its containers, are in a module with an
underscore. Tried on torch 2.8.0 and 2.14.1.
"""

from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]
