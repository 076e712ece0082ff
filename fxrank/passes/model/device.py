"""The device that a user names."""

import torch


def known_device(device: str | torch.device) -> torch.device:
    """The device, which is there: something small was put on it. Raises `ValueError`, which says what there is."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # each backend has its own
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device must be one that torch has here, {', '.join(there)} for one; got {str(device)!r}: {reason}."
        ) from error
    return found
