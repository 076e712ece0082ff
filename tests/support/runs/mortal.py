"""A model and data for `fxrank train` under torchrun: digits, and in the first start of the second process a death by SIGKILL."""

import os
import signal

import torch

from fxrank.demo import DigitsNet, digits


def network():
    torch.manual_seed(0)  # the same in every launch
    return DigitsNet(16)


class Mortal:
    """A loader whose process dies at its twelfth batch."""

    def __init__(self, batches):
        self.batches, self.dealt = batches, 0
        self.generator = batches._generator  # a checkpoint knows the generators that the loader itself holds

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.dealt += 1
            if self.dealt == 12 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    def share(self, part, parts):
        return Mortal(self.batches.share(part, parts))


def loaders():
    train, held_out = digits(0)
    return Mortal(train), held_out
