"""What a data pipeline costs: transforms, the way of a batch to the main process and on, images a second."""

import contextlib
import copy
import io
import math
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from _timing import Effort, call_times
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from vig_backbone.openmmlab.data_hook import leaves
from vig_backbone.openmmlab.fast_loading import use_fast_loading, use_stock_loading

STOCK, FAST = "stock", "fast"
LOADINGS: dict[str, Callable[[Config], Config]] = {STOCK: use_stock_loading, FAST: use_fast_loading}
ENDLESS = 10**6  # samples: more than any measurement takes


@dataclass
class Cost:
    """Of an image; with a `failure`, what was not measured before it is missing."""

    config: str
    loading: str
    failure: str = ""
    images: int = 0  # of the data set
    batch: int = 0
    transforms: list[tuple[str, float]] = field(default_factory=list)  # name, ms of CPU time
    collate_ms: float | None = None
    preprocess_ms: float | None = None
    pipe_bytes: float | None = None  # pickled, through the workers' queue
    shared_bytes: float | None = None
    shared_tensors: float | None = None  # each is a message of its own

    @property
    def sample_ms(self) -> float:
        return sum(ms for _, ms in self.transforms)


@dataclass
class Rate:
    """Of a loader with so many worker processes; with 0 the main process loads."""

    config: str
    loading: str
    workers: int
    failure: str = ""
    images_per_second: float | None = None
    main_ms: float | None = None  # CPU time of the main thread for an image


def variants(cfg: Config, loadings: list[str]) -> dict[str, Config]:
    return {loading: LOADINGS[loading](copy.deepcopy(cfg)) for loading in loadings}


def prepare_process(cfg: Config) -> None:
    """As a worker process is: one thread."""
    init_default_scope(cfg.default_scope)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what data sets print when they are built."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ---- a sample and a batch


def measure_cost(cost: Cost, cfg: Config, samples: int, repeats: int, device: torch.device) -> None:
    with quiet():
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    cost.images, cost.batch = len(dataset), cfg.train_dataloader.batch_size
    cost.transforms = transform_times(dataset, samples, repeats)

    loader = new_loader(cfg, workers=0)
    batch = [loader.dataset[i] for i in range(cost.batch)]
    times = call_times(lambda: loader.collate_fn(batch), lambda: None, Effort(repeats, 0.05))
    cost.collate_ms = times.median / cost.batch
    pipe, tensors = message_of(loader.collate_fn(batch))
    cost.pipe_bytes, cost.shared_tensors = pipe / cost.batch, len(tensors) / cost.batch
    cost.shared_bytes = sum(tensors) / cost.batch

    preprocessor = MODELS.build(cfg.model.data_preprocessor).to(device)
    collated = next(iter(loader))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = call_times(lambda: preprocessor(collated, True), synchronize, Effort(repeats, 0.05))
    cost.preprocess_ms = times.median / cost.batch


def transform_times(dataset: Any, samples: int, repeats: int) -> list[tuple[str, float]]:
    """Each transform's milliseconds of CPU time for a sample: the median over repeats of the mean over samples."""
    leaf = first_leaf(dataset)
    transforms = leaf.pipeline.transforms
    means = []
    for _ in range(repeats):
        seconds = np.zeros(len(transforms))
        for i in range(samples):
            np.random.seed(i)
            sample = copy.deepcopy(leaf.get_data_info(i % len(leaf)))
            for k, transform in enumerate(transforms):
                start = time.thread_time()
                sample = transform(sample)
                seconds[k] += time.thread_time() - start
                if sample is None:
                    break
        means.append(seconds / samples * 1e3)
    return [(type(t).__name__, float(ms)) for t, ms in zip(transforms, np.median(means, 0))]


def first_leaf(dataset: Any) -> Any:
    """The first data set inside wrappers such as RepeatDataset and ConcatDataset."""
    leaf = next(leaves(dataset), None)
    if leaf is None:
        raise TypeError(f"{type(dataset).__name__} has no pipeline and wraps no data set that has one")
    return leaf


class _Message(pickle.Pickler):
    """Tensors go through shared memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: list[int] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.storages.append(value.untyped_storage().nbytes())
        return len(self.storages)


def message_of(batch: Any) -> tuple[int, list[int]]:
    """What a worker sends: bytes through the pipe, and those of each tensor in shared memory."""
    message = _Message(file := io.BytesIO())
    message.dump(batch)
    return len(file.getvalue()), message.storages


# ---- the loader


def new_loader(cfg: Config, workers: int) -> DataLoader:
    """The config's training loader, as mmengine builds it, over its data set again and again."""
    settings = copy.deepcopy(cfg.train_dataloader)
    settings.num_workers, settings.persistent_workers = workers, False
    if workers == 0:
        settings.pop("prefetch_factor", None)
    with quiet():
        length = len(DATASETS.build(settings.dataset))
        if not length:
            raise ValueError("the data set has no usable image: check train_dataloader.dataset")
        settings.dataset = dict(type="RepeatDataset", dataset=settings.dataset, times=math.ceil(ENDLESS / length))
        return Runner.build_dataloader(settings, seed=0)


def measure_rate(rate: Rate, cfg: Config, seconds: float, repeats: int) -> None:
    """Medians over repeats, each with new worker processes."""
    found = [loader_rate(cfg, rate.workers, seconds) for _ in range(repeats)]
    rate.images_per_second, rate.main_ms = (statistics.median(values) for values in zip(*found))


def loader_rate(cfg: Config, workers: int, seconds: float) -> tuple[float, float]:
    """Images a second once the queue has run dry, and milliseconds of CPU time of the main thread for each."""
    loader = new_loader(cfg, workers)
    batches = iter(loader)
    for _ in range(2 * workers * (loader.prefetch_factor or 1) + 1):
        next(batches)
    count, start, start_cpu = 0, time.perf_counter(), time.thread_time()
    while (elapsed := time.perf_counter() - start) < seconds or count < 2 * max(workers, 1):
        next(batches)
        count += 1
    images = count * cfg.train_dataloader.batch_size
    return images / elapsed, (time.thread_time() - start_cpu) / images * 1e3
