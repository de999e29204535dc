"""Run the command line as `python -m persea.cli`."""

from persea.cli import main

main()
