"""Pictures: folders, transforms on batches, models, and other names that `from learnkit.vision import *` provides."""

from functools import partial as partial
from pathlib import Path as Path

import torch as torch
from torch import nn as nn
from torch.nn import functional as F

from learnkit.callbacks.cutmix import CutMix as CutMix
from learnkit.callbacks.label_smoothing import LabelSmoothing as LabelSmoothing
from learnkit.callbacks.mixup import MixUp as MixUp
from learnkit.data.loaders import DataBunch as DataBunch
from learnkit.data.random import Draws as Draws
from learnkit.data.random import SampleTransform as SampleTransform
from learnkit.hooks import Callback as Callback
from learnkit.learner import Learner as Learner
from learnkit.metrics import accuracy as accuracy
from learnkit.metrics import error_rate as error_rate
from learnkit.metrics import top_k_accuracy as top_k_accuracy
from learnkit.vision.archives import URLs as URLs
from learnkit.vision.augmented import tta as tta
from learnkit.vision.data import ImageDataBunch as ImageDataBunch
from learnkit.vision.interpretation import Interpretation as Interpretation
from learnkit.vision.interpretation import interpret as interpret
from learnkit.vision.models import resnet9 as resnet9
from learnkit.vision.models import resnet18_cifar as resnet18_cifar
from learnkit.vision.models import wrn_22 as wrn_22
from learnkit.vision.stats import cifar100_stats as cifar100_stats
from learnkit.vision.stats import cifar_stats as cifar_stats
from learnkit.vision.stats import fashion_stats as fashion_stats
from learnkit.vision.stats import imagenet_stats as imagenet_stats
from learnkit.vision.stats import mnist_stats as mnist_stats
from learnkit.vision.transfer import vision_learner as vision_learner
from learnkit.vision.transform import brightness as brightness
from learnkit.vision.transform import contrast as contrast
from learnkit.vision.transform import cutout as cutout
from learnkit.vision.transform import flip_lr as flip_lr
from learnkit.vision.transform import normalize as normalize
from learnkit.vision.transform import rand_pad as rand_pad
from learnkit.vision.transform import rand_resize_crop as rand_resize_crop
from learnkit.vision.transform import rotate as rotate
from learnkit.vision.transform import to_float as to_float
from learnkit.vision.transform import zoom as zoom
from learnkit.vision.untar import untar_data as untar_data

__all__ = [  # a star import does not import the submodules
    "Callback",
    "CutMix",
    "DataBunch",
    "Draws",
    "F",
    "ImageDataBunch",
    "Interpretation",
    "LabelSmoothing",
    "Learner",
    "MixUp",
    "Path",
    "SampleTransform",
    "URLs",
    "accuracy",
    "brightness",
    "cifar100_stats",
    "cifar_stats",
    "contrast",
    "cutout",
    "error_rate",
    "fashion_stats",
    "flip_lr",
    "imagenet_stats",
    "interpret",
    "mnist_stats",
    "nn",
    "normalize",
    "partial",
    "rand_pad",
    "rand_resize_crop",
    "resnet9",
    "resnet18_cifar",
    "rotate",
    "to_float",
    "top_k_accuracy",
    "torch",
    "tta",
    "untar_data",
    "vision_learner",
    "wrn_22",
    "zoom",
]
