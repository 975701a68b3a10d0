"""The callbacks that come with learnkit: one a file, each written as a user would write it."""
from learnkit.callbacks.checkpoint import Checkpoint as Checkpoint
from learnkit.callbacks.csv_logger import CSVLogger as CSVLogger
from learnkit.callbacks.distributed import Distributed as Distributed
from learnkit.callbacks.early_stopping import EarlyStopping as EarlyStopping
from learnkit.callbacks.json_logger import JSONLogger as JSONLogger
from learnkit.callbacks.mlflow_logger import MLflowLogger as MLflowLogger
from learnkit.callbacks.param_scheduler import ParamScheduler as ParamScheduler
from learnkit.callbacks.progress import Progress as Progress
from learnkit.callbacks.recorder import Recorder as Recorder
from learnkit.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau as ReduceLROnPlateau
from learnkit.callbacks.save_best import SaveBest as SaveBest
from learnkit.callbacks.stop_after import StopAfter as StopAfter
from learnkit.callbacks.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
from learnkit.callbacks.terminate_on_nan import TerminateOnNaN as TerminateOnNaN
from learnkit.callbacks.wandb_logger import WandbLogger as WandbLogger
