#!/usr/bin/env python
"""From nothing to trained models: embedded data set, UperNet and Mask R-CNN on ViG, metrics, pictures.

Trains from scratch in minutes on two CPU cores; uses the GPU where there is one. Every command that it runs is shown.

examples:
  python tools/demo.py
  python tools/demo.py --work-dir /tmp/demo
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PROGRESS = re.compile(r"(Iter|Epoch)\((train|val|test)\)|Saving checkpoint|Evaluating before")
DATA = "data/toy"


@dataclass(frozen=True)
class Task:
    name: str
    config: str
    metrics: dict[str, str]  # title -> name in the logs
    unit: float  # what the logged number is multiplied with to give percent


TASKS = (
    Task("segmentation", "seg_configs/upernet_vig_s.py", {"mIoU": "mIoU", "pixel acc.": "aAcc"}, 1),
    Task("detection", "det_configs/mask_rcnn_vig_t.py", {"box AP": "coco/bbox_mAP", "mask AP": "coco/segm_mAP"}, 100),
)


def run(log: Path, *command: str) -> None:
    """Run a command; show its progress, and keep all it prints in `log`."""
    print(f"\n$ {shlex.join(['python', *command])}\n  (everything it prints: {log})", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        lines = []
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if PROGRESS.search(line):
                print("  " + line.rpartition(" - INFO - ")[2].strip()[:150], flush=True)
    if process.wait():
        sys.exit("".join(lines[-15:]) + f"\n{command[0]} failed with exit code {process.returncode}; see {log}")


def logged(work_dir: Path, names: list[str]) -> Iterator[dict[str, float]]:
    """The evaluations of the newest run in a work dir, in order."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.parent.parent.name)
    for line in newest.read_text().splitlines():
        entry = json.loads(line)
        if all(name in entry for name in names):
            yield {name: entry[name] for name in names}


def train_and_evaluate(task: Task, work_dir: Path) -> list[str]:
    """Train, test with pictures; returns a row of the table."""
    start = time.monotonic()
    arguments = [task.config, "--data", "toy", "--work-dir", str(work_dir)]
    run(work_dir / "train.log", "tools/train.py", *arguments)
    checkpoint = Path((work_dir / "last_checkpoint").read_text().strip())
    run(
        work_dir / "test.log",
        *("tools/test.py", task.config, str(checkpoint), "--data", "toy"),
        *("--work-dir", str(work_dir / "test"), "--show-dir", str(work_dir / "overlays")),
    )
    names = list(task.metrics.values())
    before = next(logged(work_dir, names))
    after = json.loads((work_dir / "test" / "metrics.json").read_text())
    cells = [
        f"{title} {before[name] * task.unit:.1f} -> {after[name] * task.unit:.1f}"
        for title, name in task.metrics.items()
    ]
    return [task.name, Path(task.config).stem, *cells, f"{time.monotonic() - start:.0f} s"]


def draw_overview(folders: list[Path], target: Path, columns: int = 3) -> None:
    """The first overlays of each folder, a row each."""
    rows = [[Image.open(file) for file in sorted(folder.glob("*.png"))[:columns]] for folder in folders]
    width, height = (max(getattr(picture, side) for row in rows for picture in row) for side in ("width", "height"))
    gap = 12
    overview = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            overview.paste(picture, (x * (width + gap), y * (height + gap)))
    overview.resize((overview.width // 2, overview.height // 2), Image.Resampling.LANCZOS).save(target)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"), help="default: work_dirs/demo")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args(None)

    start = time.monotonic()
    preview = args.work_dir / "data.png"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    command = ["tools/make_toy_data.py", DATA, "--preview", str(preview)]
    print(f"$ {shlex.join(['python', *command])}", flush=True)
    subprocess.run([sys.executable, *command], check=True)
    rows = [train_and_evaluate(task, args.work_dir / task.name) for task in TASKS]

    print("\nOn the validation images of the embedded set, in percent, before -> after training from scratch:\n")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
    print(f"\n  data, training, evaluation and pictures: {time.monotonic() - start:.0f} s")
    folders = [args.work_dir / task.name / "overlays" for task in TASKS]
    draw_overview(folders, args.work_dir / "overview.png")
    print(f"\nPictures: {args.work_dir / 'overview.png'}  (ground truth beside prediction, both tasks)")
    for folder in folders:
        print(f"          {folder}/  (all {len(list(folder.glob('*.png')))} of them)")
    print(f"          {preview}  (the data)")
    print("\nNext: README.md, 'Training on ADE20K and COCO'.")


if __name__ == "__main__":
    main()
