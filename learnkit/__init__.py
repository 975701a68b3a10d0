"""learnkit: a Learner that trains PyTorch models with one cycle, through a pipeline of callbacks."""

from learnkit.data.loaders import DataBunch as DataBunch
from learnkit.data.loaders import TensorLoader as TensorLoader
from learnkit.export.predictor import load_learner as load_learner
from learnkit.hooks import Callback as Callback
from learnkit.hooks import SkipBackward as SkipBackward
from learnkit.hooks import SkipBatch as SkipBatch
from learnkit.hooks import SkipEpoch as SkipEpoch
from learnkit.hooks import SkipFit as SkipFit
from learnkit.hooks import SkipForward as SkipForward
from learnkit.hooks import SkipStep as SkipStep
from learnkit.hooks import SkipTrain as SkipTrain
from learnkit.hooks import SkipValidate as SkipValidate
from learnkit.hooks import StopBackward as StopBackward
from learnkit.hooks import StopBatch as StopBatch
from learnkit.hooks import StopEpoch as StopEpoch
from learnkit.hooks import StopFit as StopFit
from learnkit.hooks import StopForward as StopForward
from learnkit.hooks import StopStep as StopStep
from learnkit.hooks import StopTrain as StopTrain
from learnkit.hooks import StopValidate as StopValidate
from learnkit.learner import Learner as Learner
from learnkit.metrics import accuracy as accuracy
from learnkit.metrics import error_rate as error_rate
from learnkit.metrics import mean_absolute_error as mean_absolute_error
from learnkit.metrics import mean_squared_error as mean_squared_error
from learnkit.metrics import top_k_accuracy as top_k_accuracy
from learnkit.optim.combined import Together as Together

__version__ = "0.1.0.dev0"
