"""`python -m ptglab`, the same as the command `ptglab`."""

from ptglab.cli import main

main()
