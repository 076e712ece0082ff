"""A run as one page to look at: HTML with everything in it, from the plain data of a report, and of nothing else.

May import: nothing.
Start reading: render.py.
"""
