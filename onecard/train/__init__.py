"""Loss, loop, checkpoints, metrics and report of a run. onecard.train(config) does a whole run."""

from onecard.callable import make_callable

make_callable(__name__)
