"""The systems that the two papers compare with, written or called for the benchmarks: gradient compression and distillation."""
