"""Ways out: one file a format. Called, it writes one: onecard.export(config)."""

from onecard.callable import make_callable

make_callable(__name__)
