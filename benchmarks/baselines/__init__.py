"""What the papers compare with, each written from its own paper, or called from a kept library. Trained in one process: iterative magnitude
pruning (`imp`), GraSP (`grasp`), EB Train (`early_bird`), XNOR-Net (`xnor`) and LC compression (`lc`); start reading in `base`, `registry` has
them by name. Of several processes: `gradients`, which compresses what these send. Students of a pretrained encoder: `distilled`.
"""
