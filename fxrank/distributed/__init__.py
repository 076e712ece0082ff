"""Several processes that train one model: what they decide and send (`team`), torch's engines under it (`ddp`, `sharded`), and
one checkpoint for all (`shares`).
"""
