"""Training runs in processes of their own: a time limit for each, what they recorded, and why they failed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _compare_recorder import Record

TRAIN = Path(__file__).with_name("train.py")


@dataclass
class Run:
    """One training; with a `failure`, what it had recorded until then, if anything."""

    seed: int
    folder: str
    record: Record | None = None
    total_s: float | None = None  # of the whole process: imports, evaluations and all
    failure: str = ""


def train(run: Run, config: Path, record: Path, time_limit: float) -> None:
    """Run ``tools/train.py config`` and fill in what came out; everything it prints is in ``train.log``."""
    log = Path(run.folder) / "train.log"
    record.unlink(missing_ok=True)
    start = time.monotonic()
    code = run_within([sys.executable, str(TRAIN), str(config)], log, time_limit)
    run.total_s = time.monotonic() - start
    if record.is_file():
        run.record = Record.read(record)
    if code is None:
        run.failure = f"over the time limit of {time_limit:g} s"
    elif code or not (run.record and run.record.finished):
        run.failure = f"{reason_in(log.read_text())} (exit code {code}, {log})"


def run_within(command: list[str], log: Path, time_limit: float) -> int | None:
    """The exit code of a command; None, and none of its processes left, if it took longer."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(time_limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # an interrupt gets here, too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the workers that load its data
                process.wait()


def reason_in(log: str) -> str:
    """The error in what a command printed: its last message of its own, otherwise the last line of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    reason = errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else "nothing was printed"
    return reason[:150]
