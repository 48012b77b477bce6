"""Checkpoints that survive being killed at any moment, and finding the last whole one."""

import os
import re
import zipfile
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

TEMPORARY_SUFFIX = ".partial"
STEP_PATTERN = re.compile(r"^(?:epoch|iter)_(\d+)\.pth$")


@register_backend("atomic_local")
class AtomicLocalBackend(LocalBackend):
    """mmengine's local file backend, but a file appears under its name only once it is whole and on disk."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        with open(partial, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class _RemoveLater(LocalBackend):
    """A file backend that keeps what it is told to remove until :meth:`flush`."""

    def __init__(self) -> None:
        self._doomed: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        self._doomed.append(str(filepath))

    def flush(self, keep: str | None) -> None:
        for path in self._doomed:
            if path != keep and os.path.isfile(path):
                os.remove(path)
        self._doomed.clear()


class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook for local disks, made safe against being killed.

    A checkpoint is written beside its place and moved there when it is whole; outdated ones are removed only
    afterwards (mmengine removes first). Same arguments as `CheckpointHook`, less the choice of a file backend.

    Raises:
        ValueError: if `backend_args` or `file_client_args` is given: use mmengine's CheckpointHook for remote storage.
    """

    def __init__(self, *args, **kwargs) -> None:
        if kwargs.get("backend_args") or kwargs.get("file_client_args"):
            raise ValueError(
                "AtomicCheckpointHook writes to local disks: for backend_args / file_client_args set "
                "default_hooks.checkpoint.type='CheckpointHook'"
            )
        super().__init__(*args, **{**kwargs, "backend_args": dict(backend="atomic_local")})

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.file_backend = _RemoveLater()
        if is_main_process():
            for left_over in Path(self.out_dir).glob(f"*{TEMPORARY_SUFFIX}"):
                left_over.unlink()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self.file_backend.flush(keep=self.last_ckpt)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.flush(keep=getattr(self, "best_ckpt_path", None))


def latest_whole_checkpoint(work_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The checkpoint with the most steps that is whole, and the damaged ones that were passed over on the way."""
    steps = {}
    for path in Path(work_dir).glob("*.pth"):
        if match := STEP_PATTERN.match(path.name):
            steps[path] = int(match[1])
    damaged = []
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint file is complete: its archive opens and every checksum in it is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
