"""A web page on which a dropped image shows what models find in it; needs Gradio, the extra `app`.

Nothing leaves the machine: no analytics, no sharing, and the browser is told to fetch nothing from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError
from .drawing import Painter
from .images import read_image
from .predictor import Predictor
from .results import Detections, Result

if TYPE_CHECKING:
    import gradio

ROWS = 20  # of the table
SECONDS_KEPT = 3600  # what a page that is closed leaves in memory and on disk
LARGEST_FILE = "64mb"
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'"


@dataclass(frozen=True, eq=False)
class Shown:
    """What a page shows: kept, so that another threshold needs no second prediction."""

    model: str
    image: np.ndarray
    result: Result


class Views:
    """What the page asks for: a picture [H, W, 3] in RGB and a table in Markdown."""

    def __init__(self, models: Mapping[str, Predictor]) -> None:
        self.models = models
        self.painters = {name: Painter(model.classes, model.palette) for name, model in models.items()}

    def predict(self, model: str, file: str | None) -> Shown | None:
        """Of an uploaded file, if there is one. Raises ImageError."""
        if not file:
            return None
        image = read_image(file)
        return Shown(model, image, self.models[model](image)[0])

    def draw(self, shown: Shown | None, threshold: float) -> tuple[np.ndarray | None, str]:
        if shown is None:
            return None, ""
        picture = self.painters[shown.model].draw(shown.image, shown.result, threshold)
        if isinstance(shown.result, Detections):
            return picture, _table_of_objects(shown.result, threshold)
        return picture, _table_of_classes(shown.result.to_dict()["classes"])

    def has_scores(self, model: str) -> bool:
        return self.models[model].task == "detection"


def build_page(models: Mapping[str, Predictor], examples: Sequence[Path] = (), threshold: float = 0.3) -> gradio.Blocks:
    """The page for models by the names that it shows.

    Args:
        examples: images to click on.
        threshold: where the slider begins.

    Raises:
        ConfigError: Gradio is not installed.
    """
    gr = _gradio()
    views = Views(models)
    first = next(iter(models))

    def predict(model: str, file: str | None, threshold: float) -> tuple[Any, ...]:
        try:
            shown = views.predict(model, file)
        except DataError as error:
            raise gr.Error(f"This image cannot be used: {error}", print_exception=False) from error
        return shown, *views.draw(shown, threshold), gr.Slider(visible=views.has_scores(model))

    with gr.Blocks(title="ViG", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown("# ViG: detection and segmentation\nDrop an image; it stays on the machine that serves this page.")
        shown = gr.State(None, time_to_live=SECONDS_KEPT)
        with gr.Row():
            with gr.Column():
                model = gr.Dropdown(list(models), value=first, label="Model", elem_id="model")
                # The file as it is: `read_image` knows more kinds, and reads them as in training.
                file = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", elem_id="image",
                    buttons=["fullscreen"],
                )  # fmt: skip
                slider = gr.Slider(
                    0, 1, threshold, step=0.01, label="Least score", visible=views.has_scores(first), elem_id="score"
                )
                if examples:
                    gr.Examples([str(path) for path in examples], file, label="Examples")
            with gr.Column():
                picture = gr.Image(
                    label="Result", show_label=False, format="jpeg", interactive=False, elem_id="result",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                table = gr.Markdown(elem_id="found")
        outputs = [shown, picture, table, slider]
        gr.on([file.change, model.change], predict, [model, file, slider], outputs, api_visibility="private")
        slider.input(
            views.draw, [shown, slider], [picture, table],
            trigger_mode="always_last", show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page


def serve_page(page: gradio.Blocks, host: str, port: int | None) -> str:
    """Start serving in threads of this process; returns the address. Without a port, the first free one from 7860.

    Raises:
        ConfigError: the address cannot be had.
    """
    gr = _gradio()
    from starlette.middleware import Middleware

    fonts = ["system-ui", "sans-serif"]
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,  # of files that no decoder knows, before they come to `predict`
            footer_links=[],
            max_file_size=LARGEST_FILE,
            theme=gr.themes.Base(font=fonts, font_mono=["monospace"]),
            app_kwargs=dict(middleware=[Middleware(_OwnContentAlone)]),
        )
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot serve there ({error})") from error
    return address


class _OwnContentAlone:
    """Every answer tells the browser to load nothing from other hosts."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _gradio() -> ModuleType:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, and later
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"the web page needs Gradio ({error}): pip install -e '.[app]'") from error
    return gradio


def _table_of_objects(found: Detections, threshold: float) -> str:
    kept = found.above(threshold)
    if not len(kept):
        return f"Nothing with a score of {threshold:g} or more; {len(found)} with less."
    rows = [
        f"| {_cell(name)} | {score:.2f} | {', '.join(f'{value:.0f}' for value in box)} |"
        for name, score, box in zip(kept.names[:ROWS], kept.scores, kept.boxes)
    ]
    more = [f"\nand {len(kept) - ROWS} more"] if len(kept) > ROWS else []
    return "\n".join(["| class | score | x1, y1, x2, y2 |", "|---|---|---|", *rows, *more])


def _table_of_classes(classes: list[dict]) -> str:
    rows = [f"| {_cell(each['class'])} | {each['share']:.1%} |" for each in classes[:ROWS]]
    more = [f"\nand {len(classes) - ROWS} more"] if len(classes) > ROWS else []
    return "\n".join(["| class | share of the image |", "|---|---|", *rows, *more])


def _cell(name: str) -> str:
    """Names of classes come from checkpoints: as text, whatever Markdown would make of them."""
    return "".join(f"&#{ord(letter)};" if not letter.isalnum() and letter != " " else letter for letter in name)
