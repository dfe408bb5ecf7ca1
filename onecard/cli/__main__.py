"""`python -m onecard.cli`."""

from onecard.cli import main

main()
