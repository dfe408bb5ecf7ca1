"""`python -m onecard`, as torchrun needs it."""

from onecard.cli import main

main()
