"""Training on one process, on many, and on many machines, with the same numbers. In a world of one nothing is done.

from learnkit.distributed import *

init_process_group(seed=42)                       # torchrun, torch.distributed.launch, SLURM, launch(), or alone
model = prepare_model(Net())
loader = prepare_data_loader(loader, seed=42)
"""

import sys as _sys

import torch as torch  # older scripts write `from … import *` and then torch.cuda.set_device

from learnkit.data.shares import dataset_order as dataset_order
from learnkit.data.shares import global_batches as global_batches
from learnkit.data.shares import rank_batches as rank_batches
from learnkit.data.shares import shard_batch as shard_batch
from learnkit.distributed import world as _world
from learnkit.distributed.batchnorm import GlobalBatchNorm as GlobalBatchNorm
from learnkit.distributed.batchnorm import restore_batchnorm as restore_batchnorm
from learnkit.distributed.batchnorm import sync_batchnorm as sync_batchnorm
from learnkit.distributed.compare import check_same as check_same
from learnkit.distributed.fully_shard import shard_model as shard_model
from learnkit.distributed.guard import Guard as Guard
from learnkit.distributed.guard import guard as guard
from learnkit.distributed.launch import RankFailed as RankFailed
from learnkit.distributed.launch import launch as launch
from learnkit.distributed.prepare import communication_of as communication_of
from learnkit.distributed.prepare import gradient_order_of as gradient_order_of
from learnkit.distributed.prepare import prepare_model as prepare_model
from learnkit.distributed.prepare import prepare_optimizer as prepare_optimizer
from learnkit.distributed.prepare import unwrap_model as unwrap_model
from learnkit.distributed.reduce import agree as agree
from learnkit.distributed.reduce import all_sum as all_sum
from learnkit.distributed.reduce import barrier as barrier
from learnkit.distributed.reduce import broadcast_from_main as broadcast_from_main
from learnkit.distributed.reduce import gather_for_metrics as gather_for_metrics
from learnkit.distributed.reduce import gather_objects as gather_objects
from learnkit.distributed.reduce import gather_on_main as gather_on_main
from learnkit.distributed.reduce import on_main as on_main
from learnkit.distributed.reduce import rank0_first as rank0_first
from learnkit.distributed.shard import ShardedBatchSampler as ShardedBatchSampler
from learnkit.distributed.shard import ShardedLoader as ShardedLoader
from learnkit.distributed.shard import ShardedStream as ShardedStream
from learnkit.distributed.shard import prepare_data_loader as prepare_data_loader
from learnkit.distributed.shard import set_epoch as set_epoch
from learnkit.distributed.world import destroy_process_group as destroy_process_group
from learnkit.distributed.world import get_device as get_device
from learnkit.distributed.world import get_local_rank as get_local_rank
from learnkit.distributed.world import get_rank as get_rank
from learnkit.distributed.world import get_world_size as get_world_size
from learnkit.distributed.world import init_process_group as init_process_group
from learnkit.distributed.world import is_main as is_main
from learnkit.distributed.world import seed_by_rank as seed_by_rank

if any(argument.startswith(_world.SPELLINGS) for argument in _sys.argv[1:]):
    _world.accept_both_spellings()

__all__ = [  # the submodules stay out of a star import
    "GlobalBatchNorm",
    "Guard",
    "RankFailed",
    "ShardedBatchSampler",
    "ShardedLoader",
    "ShardedStream",
    "agree",
    "all_sum",
    "barrier",
    "broadcast_from_main",
    "check_same",
    "communication_of",
    "dataset_order",
    "destroy_process_group",
    "gather_for_metrics",
    "gather_objects",
    "gather_on_main",
    "get_device",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "global_batches",
    "gradient_order_of",
    "guard",
    "init_process_group",
    "is_main",
    "launch",
    "on_main",
    "prepare_data_loader",
    "prepare_model",
    "prepare_optimizer",
    "rank0_first",
    "rank_batches",
    "restore_batchnorm",
    "seed_by_rank",
    "set_epoch",
    "shard_batch",
    "shard_model",
    "sync_batchnorm",
    "torch",
    "unwrap_model",
]
