"""For loggers of your own: the journal that the package's loggers are built on, see learnkit.logs.journal."""

from learnkit.logs.journal import Journal as Journal
from learnkit.logs.journal import Sink as Sink
