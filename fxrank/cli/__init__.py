"""The `fxrank` command: demo, train, compress, profile, inspect, report, env and completion, and the models and data that it takes by name.

May import: _version, auto, demo, distributed, large, oneshot, page, passes, plan, policies, profiling, saving, switch, training.
Start reading: main.py.
"""
