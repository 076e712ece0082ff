"""Several processes that train one model: what they decide and send (`team`), how they are started (`launch`), and what becomes
of torch's engines under it at the switch (`ddp`, `fsdp2`).

May import: loggers, passes, plan, switch, torch_private.
Start reading: team.py.
"""
