"""What parts are drawn with, and the list of all parts by the stream that they take and return."""

import random

STREAMS = ("tokens", "vectors", "images")
TOKENS, SIDE = 5, 6
"""How many tokens a sequence has, and how many pixels a side of an image."""

PARTS = {stream: [] for stream in STREAMS}


class Draw(random.Random):
    """A source of choices: the same seed makes the same model."""

    def flip(self, chance=0.5):
        return self.random() < chance


def part(*streams):
    """Enter a class whose instances, `cls(draw, width)`, keep the shape of such a stream: tokens `(batch, tokens, width)`, vectors
    `(batch, width)`, images `(batch, width, side, side)`. The width is even; the file says the kind.
    """

    def register(cls):
        for stream in streams:
            PARTS[stream].append(cls)
        return cls

    return register


def kind_of(cls):
    return cls.__module__.rpartition(".")[2]
