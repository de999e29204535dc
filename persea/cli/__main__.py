"""python -m persea.cli: the command line without the installed script."""

from persea.cli import main

main()
