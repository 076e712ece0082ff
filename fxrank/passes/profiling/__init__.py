"""How long a layer takes on this device, dense and as a factor pair: the measurement behind K.

May import: discovery, pairs.
Start reading: timing.py.
"""
