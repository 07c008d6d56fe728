"""Runs the command line as a module: `python -m jepa3d`, or `torchrun -m jepa3d` to use several
processes.
"""

import sys

from jepa3d.cli import main

# Worker processes import this file under another name, so they skip this block.
if __name__ == "__main__":
    # A run records its command. The command should begin with "jepa3d", not with this file's path.
    sys.argv[0] = "jepa3d"
    main()
