"""`python -m ptglab`, the same as the command `ptglab`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder, where images may lie beside modules that are not ours to run

from ptglab.cli import main

main()
