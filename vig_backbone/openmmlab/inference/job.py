"""Many images and videos through a predictor: in batches, in order, past the files that cannot be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .images import ImageError, read_image
from .inputs import Source
from .predictor import Predictor
from .results import Result
from .video import VideoReader

READERS = 2  # threads that decode and prepare images while the model is busy


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, or a frame of a video: RGB [H, W, 3] uint8; number and rate (frames a second) are None for images."""

    source: Source
    image: np.ndarray
    number: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Failure:
    """A source that could not be used, or not to its end."""

    source: Source
    reason: str


Prepared = tuple[Frame, dict[str, Any]]


def predict_sources(
    predictor: Predictor, sources: Iterable[Source], batch_size: int = 1
) -> Iterator[tuple[Frame, Result] | Failure]:
    """Results in the order of the sources; a failure comes where its source would have come, or its next frame."""
    waiting: list[Prepared | Failure] = []
    for each in _prepared(predictor, sources, batch_size):
        waiting.append(each)
        if sum(not isinstance(one, Failure) for one in waiting) == batch_size:
            yield from _predicted(predictor, waiting)
            waiting = []
    yield from _predicted(predictor, waiting)


def _predicted(predictor: Predictor, waiting: list[Prepared | Failure]) -> Iterator[tuple[Frame, Result] | Failure]:
    results = iter(predictor.predict([each[1] for each in waiting if not isinstance(each, Failure)]))
    for each in waiting:
        yield each if isinstance(each, Failure) else (each[0], next(results))


def _prepared(predictor: Predictor, sources: Iterable[Source], batch_size: int) -> Iterator[Prepared | Failure]:
    """Images are read ahead by threads; the frames of a video follow each other anyway."""
    pending: deque[Future[Prepared | Failure] | Source] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for source in sources:
                pending.append(source if source.is_video else pool.submit(_prepare_image, predictor, source))
                if len(pending) > READERS + batch_size:
                    yield from _finished(predictor, pending.popleft())
            while pending:
                yield from _finished(predictor, pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(predictor: Predictor, one: Future[Prepared | Failure] | Source) -> Iterator[Prepared | Failure]:
    if isinstance(one, Source):
        yield from _prepare_video(predictor, one)
    else:
        yield one.result()


def _prepare_image(predictor: Predictor, source: Source) -> Prepared | Failure:
    try:
        image = read_image(source.path)
        return Frame(source, image), predictor.prepare(image)
    except ImageError as error:
        return Failure(source, str(error))


def _prepare_video(predictor: Predictor, source: Source) -> Iterator[Prepared | Failure]:
    try:
        video = VideoReader(source.path)
        for number, image in enumerate(video):
            yield Frame(source, image, number, video.rate), predictor.prepare(image)
    except ImageError as error:
        yield Failure(source, str(error))
