"""What the commands that work from a config share: arguments, and errors without a traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction

from vig_backbone import CheckpointError
from vig_backbone.openmmlab.configuration import load_config, use_compile
from vig_backbone.openmmlab.errors import ConfigError, DataError
from vig_backbone.openmmlab.finite_steps import NonFiniteError


def add_config_arguments(parser: argparse.ArgumentParser, launcher: bool = True) -> None:
    """Those of every command that works from a config; without `launcher`, of one that is a single process."""
    parser.add_argument("config", help="seg_configs/*.py or det_configs/*.py, or a config that inherits from one")
    parser.add_argument("--data", metavar="NAME", help="another data set: 'toy' and 'hard' are embedded ones")
    parser.add_argument("--work-dir", metavar="DIR", help="logs and checkpoints (default: work_dirs/CONFIG)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="change fields of the config, e.g. optim_wrapper.optimizer.lr=1e-4 model.backbone.with_cp=True",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the backbone, for all image sizes")
    if launcher:
        parser.add_argument(
            "--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how it was started"
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_amp_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--amp",
        nargs="?",
        const="bfloat16",
        choices=("bfloat16", "float16"),
        help="automatic mixed precision (default type: bfloat16)",
    )


def load(args: argparse.Namespace) -> Config:
    """The config of the command line, with its work dir set."""
    cfg = load_config(args.config, args.data, args.cfg_options)
    if args.compile:
        use_compile(cfg)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    os.environ.setdefault("LOCAL_RANK", "0")
    return cfg


def run_command(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run main(args); a mistake of the user's becomes a message and exit code 2 (with --debug, a traceback)."""
    try:
        main(args)
    except (ConfigError, DataError, CheckpointError, NonFiniteError) as error:
        if args.debug:
            raise
        print(f"error: {_message(error)}\n(--debug shows the traceback)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _message(error: Exception) -> str:
    """The message itself: from a worker process of a data loader it comes wrapped in the text of a traceback."""
    text = str(error)
    marker = f".{type(error).__name__}: "
    return text.rpartition(marker)[2].strip() if "Original Traceback" in text else text
