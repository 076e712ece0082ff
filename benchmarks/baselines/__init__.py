"""What the papers compare with and train in one process, each written from its own paper: iterative magnitude pruning (`imp`), GraSP
(`grasp`), EB Train (`early_bird`), XNOR-Net (`xnor`) and LC compression (`lc`). Start reading in `base`; `registry` has them by name.
"""
