"""The command line as a module: `python -m jepa3d`, or `torchrun -m jepa3d` on several processes."""

import sys

from jepa3d.cli import main

if __name__ == "__main__":  # worker processes import this file under another name
    sys.argv[0] = "jepa3d"  # instead of this file's path, in the command that a run records
    main()
