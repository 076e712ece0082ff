"""Singular values of weights: whole spectra and truncated factors (`exact`), the leading vectors of large weights alone (`leading`),
and σ_max of many weights followed over the training at a few products each (`tracked`).

May import: errors.
Start reading: exact.py.
"""
