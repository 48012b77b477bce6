"""When skipped updates are reported, and that no checkpoint holds a model with values that are not finite."""

from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner

from .finite_steps import FiniteOptimWrapper, NonFiniteError, last_checkpoint


class FiniteStepsHook(Hook):
    """Reads the wrappers of `finite_steps` when losses are logged, and keeps a broken model out of the checkpoints.

    Raises:
        NonFiniteError: instead of writing a checkpoint whose parameters or buffers are not finite; those that are
            there stay (with `AtomicCheckpointHook`). Also what the wrapper raises.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        if isinstance(runner.optim_wrapper, FiniteOptimWrapper):
            runner.optim_wrapper.remember_losses(outputs or {})
            intervals = [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)]
            if any(self.every_n_inner_iters(batch_idx, interval) for interval in intervals):
                runner.optim_wrapper.read()

    def after_train(self, runner: Runner) -> None:
        if isinstance(runner.optim_wrapper, FiniteOptimWrapper):
            runner.optim_wrapper.read()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        weights = checkpoint["state_dict"]
        wrong = [name for name, x in weights.items() if x.is_floating_point() and not x.isfinite().all()]
        if wrong:
            raise NonFiniteError(
                f"iteration {runner.iter + 1}: no checkpoint was written, {len(wrong)} of {len(weights)} tensors of "
                f"the model are not finite: {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}. "
                f"{last_checkpoint(runner.message_hub)}. Go on from a checkpoint with a lower learning rate, or with "
                "bfloat16 instead of float16"
            )
