"""The numbers before training, beside those after it."""

from mmengine.hooks import Hook
from mmengine.runner import Runner


class EvaluateFirstHook(Hook):
    """Run one validation before the first training step (not when resuming)."""

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        if runner.iter == 0 and runner.val_loop is not None:
            runner.logger.info("Evaluating before training")
            runner.val_loop.run()
