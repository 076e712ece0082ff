"""Benchmarks: the papers' tables, and what fxrank itself costs."""
