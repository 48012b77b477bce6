#!/usr/bin/env python
"""A web page: drop an image, pick a model, see classes or instances, move the threshold of scores.

examples:
  python tools/app.py                                # the models that `make demo` trained
  python tools/app.py det_configs/mask_rcnn_hier_vig_t.py work_dirs/mask_rcnn_hier_vig_t/epoch_12.pth
  python tools/app.py seg_configs/upernet_vig_s.py A.pth det_configs/mask_rcnn_vig_t.py B.pth --port 8000

It is served to this machine alone; --host 0.0.0.0 serves everyone who can reach it. Needs Gradio:
pip install -e '.[app]'. Nothing is sent anywhere: no analytics, no sharing, no fonts or scripts of other hosts.

exit code: 0 ended with Ctrl+C, 2 wrong usage, or a model that cannot be loaded
"""

import argparse
import sys
import warnings
from pathlib import Path

from _command import run_command
from demo import DATA, TASKS
from mmengine.config import DictAction

from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.inference import Predictor
from vig_backbone.openmmlab.inference.web_page import build_page, serve_page

NUM_EXAMPLES = 6
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="CONFIG CHECKPOINT", help="pairs (default: the demo's two)")
    parser.add_argument("--data", metavar="NAME", help="laid over the configs, as in training: 'toy', 'hard'")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change fields of the configs"
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/demo"), help="of tools/demo.py (default: work_dirs/demo)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--score-threshold", type=float, default=0.3, metavar="S", help="to begin with (default: 0.3)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if len(args.models) % 2:
        parser.error(f"{' '.join(args.models)}: expected pairs, a checkpoint after each config")
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold {args.score_threshold}: expected a number from 0 to 1")
    return args


def demo_models(work_dir: Path) -> list[tuple[str, str]]:
    """Config and last checkpoint of each task that the demo has trained."""
    records = {task.config: work_dir / task.name / "last_checkpoint" for task in TASKS}
    found = [(config, record.read_text().strip()) for config, record in records.items() if record.is_file()]
    found = [(config, checkpoint) for config, checkpoint in found if Path(checkpoint).is_file()]
    if not found:
        raise ConfigError(
            f"no trained model in {work_dir}: run `make demo` first, or give a CONFIG and its CHECKPOINT; --help has "
            "examples"
        )
    return found


def example_images() -> list[Path]:
    """Of the demo's data, which its models were not trained on."""
    return sorted(Path(DATA).glob("coco/val2017/*.jpg"))[:NUM_EXAMPLES]


def load_models(args: argparse.Namespace) -> dict[str, Predictor]:
    given = list(zip(args.models[::2], args.models[1::2]))
    data = args.data if given else "toy"
    models = {}
    for config, checkpoint in given or demo_models(args.work_dir):
        print(f"loading {config} with {checkpoint}", flush=True)
        model = Predictor(config, checkpoint, data=data, options=args.cfg_options, device=args.device)
        models[f"{model.task}: {Path(config).stem}, {Path(checkpoint).name}"] = model
    return models


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")  # of stock models, about arguments of stock configs
    models = load_models(args)
    page = build_page(models, [] if args.models else example_images(), args.score_threshold)
    address = serve_page(page, args.host, args.port)
    if args.host not in LOCAL_HOSTS:
        print(f"everyone who can reach {args.host} can use this page")
    print(f"open {address} in a browser; Ctrl+C ends", flush=True)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args(None)))
