"""Loss, loop, checkpoints, metrics and report of a run. Called, it is the whole run: onecard.train(config)."""

from onecard.callable import make_callable

make_callable(__name__)
