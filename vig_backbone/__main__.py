"""Run a script of a stock mmdet or mmseg with this package imported first: `python -m vig_backbone SCRIPT [ARGS...]`.

Such a script may import `mmcv.ops` or read a `mmdet::` config before the `custom_imports` of its config are followed.
"""

import argparse
import runpy
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Run the script argv[0] with the arguments argv[1:] as `python SCRIPT` would.

    Exits with code 2 if there is no such file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vig_backbone",
        usage="%(prog)s SCRIPT [ARGS...]",
        description="Run a script of a stock mmdet or mmseg with vig_backbone imported first.",
        epilog="example: %(prog)s mmdetection/tools/train.py CONFIG --work-dir DIR; under torchrun: "
        "torchrun --nproc_per_node 8 -m vig_backbone mmdetection/tools/train.py CONFIG --launcher pytorch",
    )
    parser.add_argument("script", help="a Python file; everything after it is passed on to it")
    script = Path(parser.parse_args(argv[:1]).script)
    if not script.is_file():
        parser.error(f"no script at {script}")
    sys.argv = argv
    if not getattr(sys.flags, "safe_path", False):  # `python -m` put the working directory first
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
