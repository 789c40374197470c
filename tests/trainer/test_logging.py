"""What is logged, and that nothing else is."""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_lookahead import Linear, LookaheadCallback
from tests.helpers.runs import Regression, SeveralSteps, equal, fit, logged_by, make_trainer


def test_syncs_and_distance_are_logged_and_change_nothing():
    callback, module = LookaheadCallback(k=3, log_syncs=True, log_distance=True), Regression(batches=10)
    trainer = make_trainer(callback, max_epochs=1, logger=CSVLogger("logs"), log_every_n_steps=5)
    trainer.fit(module)
    rows = logged_by(trainer.logger)
    assert [(row["step"], float(row["lookahead/syncs"])) for row in rows] == [("4", 1), ("9", 3)]  # steps count from 0
    distance = callback.slow_weights[0].last_distance
    assert distance > 0
    assert float(rows[-1]["lookahead/distance"]) == distance.item()
    assert trainer.callback_metrics == trainer.progress_bar_metrics == {}
    quiet = Regression(batches=10)
    make_trainer(LookaheadCallback(k=3), max_epochs=1).fit(quiet)
    assert equal(quiet.weights(), module.weights())


def test_the_metrics_of_a_run_are_what_they_are_without_us():
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, prog_bar=True)
            return loss

    seen = []
    for own in ([], [LookaheadCallback(k=1, alpha=1.0)]):
        trainer = make_trainer(*own, max_epochs=2, limit_val_batches=1, logger=CSVLogger("logs"), log_every_n_steps=2)
        trainer.fit(Logs())
        metrics = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
        seen.append(([dict(part) for part in metrics], logged_by(trainer.logger)))
    assert seen[0] == seen[1]


def test_each_optimizer_has_its_own_key():
    trainer = make_trainer(
        LookaheadCallback(k=2, log_syncs=True), max_epochs=1, logger=CSVLogger("logs"), log_every_n_steps=1
    )
    trainer.fit(SeveralSteps(first=1))
    assert float(logged_by(trainer.logger)[-1]["lookahead/syncs/0"]) == 2
    assert float(logged_by(trainer.logger)[-1]["lookahead/syncs/1"]) == 2


def test_a_barebones_trainer_is_not_warned_of_our_logging(recwarn):
    callback = LookaheadCallback(k=2)
    trainer = Trainer(barebones=True, accelerator="cpu", max_steps=6, limit_val_batches=0, callbacks=[callback])
    trainer.fit(Regression())
    assert callback.slow_weights[0].syncs == 3
    assert not any("self.log" in str(warning.message) for warning in recwarn)


def test_a_changing_alpha_is_logged_and_another_is_not():
    logger = CSVLogger(".", name="log")
    fit(LookaheadCallback(k=2, alpha=Linear(0.5, 1.0, 2), log_syncs=True), logger=logger, log_every_n_steps=1)
    logged = [float(row["lookahead/alpha"]) for row in logged_by(logger) if row.get("lookahead/alpha")]
    assert logged[0] == 0.5
    assert logged[-1] == 1.0
    logger = CSVLogger(".", name="log")
    fit(LookaheadCallback(k=2, log_syncs=True), logger=logger, log_every_n_steps=1)
    assert not any("lookahead/alpha" in row for row in logged_by(logger))
