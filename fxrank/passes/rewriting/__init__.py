"""What puts pairs in the place of layers: in the graph (`factorize`, run by `driver`) and in the user's module tree (`install`).

`calibrate` makes an extra BatchNorm between the factors start as the identity.
May import: model, pairs, torch_private, tracing.
Start reading: driver.py, then factorize.py.
"""
