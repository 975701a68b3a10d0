"""The callbacks that come with learnkit: one a file, each written as a user would write it."""
from learnkit.callbacks.checkpoint import Checkpoint as Checkpoint
from learnkit.callbacks.cutmix import CutMix as CutMix
from learnkit.callbacks.distributed import Distributed as Distributed
from learnkit.callbacks.early_stopping import EarlyStopping as EarlyStopping
from learnkit.callbacks.label_smoothing import LabelSmoothing as LabelSmoothing
from learnkit.callbacks.mixup import MixUp as MixUp
from learnkit.callbacks.param_scheduler import ParamScheduler as ParamScheduler
from learnkit.callbacks.progress import Progress as Progress
from learnkit.callbacks.recorder import Recorder as Recorder
from learnkit.callbacks.save_best import SaveBest as SaveBest
from learnkit.callbacks.stop_after import StopAfter as StopAfter
from learnkit.callbacks.terminate_on_nan import TerminateOnNaN as TerminateOnNaN
