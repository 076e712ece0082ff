"""From calibration batches to factors that know the data: what layers see and give (`moments`, `collect`), and the factors whose
outputs differ least from the layer's (`projection`); exact statistics of BatchNorm afterwards (`batchnorm`).

May import: discovery, errors, model, pairs, spectra, torch_private.
Start reading: projection.py, then collect.py.
"""
