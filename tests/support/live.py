"""Short runs whose factors at the switch know the data."""

from nets import attach, mlp, sgd, train, vectors

import fxrank

X, Y = vectors(64)
DATA = fxrank.Pufferfish(E=3, K=0, ratio=0.25, factors="data")


def attached(model, policy=DATA, x=X, optimizer=None, **options):
    optimizer = sgd(model) if optimizer is None else optimizer
    return optimizer, attach(model, optimizer, policy, x, **({"steps_per_epoch": 1} | options))


def run(policy=DATA, make=mlp, batch=(X, Y), steps=3, **options):
    model = make()
    optimizer, session = attached(model, policy, batch[0], **options)
    losses = train(model, optimizer, steps, batch)
    return model, session, losses
