"""CIFAR-10 as fast as possible, with the public API only.

    python examples/06_speedrun.py

Uses LEARNKIT_DATA=/path/to/cifar10.tar.xz (or a folder of pictures) instead of a download.
Claim: accuracy 0.38 (mean of n = 3 seeds, 0.34 to 0.42), on one thread of a shared CPU, with 64 training and 50 test
pictures per class reduced to 16×16: with size=16, rand_pad(2, 16), cutout(4), bs=64, resnet9(width=16) and a rate of
0.1 instead of the values below. The accuracy on all pictures was not measured on a CPU.
"""

from functools import partial

from learnkit.vision import *

torch.backends.cudnn.benchmark = True
path = untar_data(URLs.CIFAR)
ds_tfms = ([*rand_pad(2, 32), flip_lr(alternating=True), cutout(8)], [])
data = ImageDataBunch.from_folder(path, valid="test", ds_tfms=ds_tfms, bs=512).normalize(cifar_stats)
sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
learn = Learner(data, resnet9(), opt_func=sgd, wd=5e-4, bn_wd=False, metrics=accuracy, callbacks=LabelSmoothing(0.2))
learn.fit_one_cycle(10, 0.4, moms=None, div_factor=5, pct_start=0.25)
preds, targets = tta(learn, tfms=[flip_lr(p=1)], n=1)
print(f"accuracy {accuracy(preds, targets):.4f} with mirror images")
