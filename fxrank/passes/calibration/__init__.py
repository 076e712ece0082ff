"""From calibration batches to factors that know the data: what layers see and give (`moments`, `collect`, `reads`), and the factors whose
outputs differ least from the layer's (`projection`; `spatial` for kernels, `joint` for a weight of several uses); exact statistics of
BatchNorm afterwards (`batchnorm`).

May import: discovery, errors, model, pairs, spectra, torch_private.
Start reading: projection.py, then collect.py.
"""
