"""CIFAR-10 with a wide ResNet and one cycle: the same script for one process or many.

    python examples/04_cifar.py
    torchrun --nproc-per-node=2 examples/04_cifar.py
    python -m torch.distributed.launch --nproc-per-node=2 examples/04_cifar.py

Downloads CIFAR-10 once, or uses LEARNKIT_DATA=/path/to/cifar10.tar.xz (or a folder of pictures). `bs` is per process.
Claim: accuracy 0.30 (mean of n = 3 seeds, 0.27 to 0.32), in one process on one thread of a shared CPU, with 64 training
and 50 test pictures per class reduced to 8×8: with size=8, and rand_pad(2, 8) instead of rand_pad(4, 32). The accuracy
on all pictures was not measured on a CPU.
"""

from learnkit.distributed import *
from learnkit.vision import *
from learnkit.vision.models.wrn import wrn_22

local_rank = get_local_rank()  # LOCAL_RANK, or --local-rank / --local_rank on the command line, or 0
path = untar_data(URLs.CIFAR)  # downloads once per machine, rank 0 first
ds_tfms = ([*rand_pad(4, 32), flip_lr(p=0.5)], [])
data = ImageDataBunch.from_folder(path, valid="test", ds_tfms=ds_tfms, bs=128).normalize(cifar_stats)
learn = Learner(data, wrn_22(), metrics=accuracy).to_distributed(local_rank)
learn.fit_one_cycle(10, 3e-3, wd=0.4, div_factor=10, pct_start=0.5)
