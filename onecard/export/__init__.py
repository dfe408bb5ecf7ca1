"""Export formats. The module is callable: onecard.export(config) writes one."""

from onecard.callable import make_callable

make_callable(__name__)
