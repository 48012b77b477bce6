"""The order of the images, and who draws which random numbers: from the seed, for any number of processes."""

import random
from itertools import chain, islice, repeat

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import BatchSampler


class DataOrderHook(Hook):
    """Before training: one order of the images for a seed, gone on with on resuming; random numbers by process.

    - The images come in the order of the run's seed. When a run is resumed, that is the seed of the checkpoint, also
      if the config states none: mmengine reads it too late and draws another order.
    - A resumed run over iterations goes on where it stopped. mmengine loads and throws away every batch up to there,
      which takes as long as loading them did.
    - Worker processes of such a run start anew. The first ones start before any hook is called, and would know nothing
      of what hooks do to the data set, such as the checks of `CheckDataHook`.
    - Data-parallel processes, and the parts of a run that was resumed, draw different random numbers: drop path,
      dropout, sampled proposals, and augmentation without worker processes. mmengine gives all of them the same.
    """

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        seed = _seed(runner)
        sampler = getattr(loop.dataloader.batch_sampler, "sampler", None)
        if hasattr(sampler, "seed"):
            sampler.seed = seed
        if isinstance(loop, IterBasedTrainLoop):
            _go_to(loop, loop.iter)
        _draw_from(seed + runner.rank + runner.world_size * runner.iter)


def _seed(runner: Runner) -> int:
    """The run's seed, without what mmengine adds for the process if `diff_rank_seed` is set."""
    return runner.seed - runner.rank * bool(runner._randomness_cfg.get("diff_rank_seed"))


def _go_to(loop: IterBasedTrainLoop, iteration: int) -> None:
    """Have the loop's data begin at `iteration`; other samplers than mmengine's are left to mmengine."""
    batches = loop.dataloader.batch_sampler
    if type(batches) is not BatchSampler or not isinstance(batches.sampler, InfiniteSampler):
        return
    if workers := loop.dataloader._iterator:  # persistent ones
        workers._shutdown_workers()
        loop.dataloader._iterator = None
    batches.sampler.indices = islice(batches.sampler._indices_of_rank(), iteration * batches.batch_size, None)
    # The loop takes as many batches as there were iterations before it trains.
    loop.dataloader_iterator = chain(repeat(None, iteration), _InfiniteDataloaderIterator(loop.dataloader))


def _draw_from(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of all devices
