"""The frameworks' own habits: a callback for each trainer, and loggers. Nothing here is imported by `import fxrank`:
import `fxrank.integrations.huggingface`, `fxrank.integrations.lightning`, `fxrank.integrations.loggers`.

May import: loggers, passes, plan, policies, saving, session, switch, torch_private, training.
Start reading: lightning.py.
"""
