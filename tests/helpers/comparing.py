"""A fit that is compared, and what a comparison of it has to find."""

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, last_loss, make_trainer, reference


def trained(steps=7, model=None, callback=None, **settings):
    callback = callback or LookaheadCallback(k=3)
    model = model or Regression()
    trainer = make_trainer(callback, max_steps=steps, **{"limit_val_batches": 1.0, **settings})
    trainer.fit(model)
    return trainer, model, callback


def expected(steps=7):
    theta, phi = reference(steps)
    return {"val_loss": last_loss(phi)}, {"val_loss": last_loss(theta)}
