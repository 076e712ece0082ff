"""How long a layer takes on this device, dense and as a factor pair: the measurement behind K; and how long whole models take.

May import: discovery, model, pairs, spectra, torch_private.
Start reading: timing.py.
"""
