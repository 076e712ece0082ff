"""What a pair is to code that reads its weight: a tensor that multiplies through the factors, and is written into through them.

May import: errors, model, pairs, spectra, torch_private.
Start reading: weight.py, then factored_weight.py.
"""
