"""The command line as a module: `python -m jepa3d`, or `torchrun -m jepa3d` for several processes."""

import sys

from jepa3d.cli import main

# False in worker processes, which import this file by another name.
if __name__ == "__main__":
    sys.argv[0] = "jepa3d"  # this name, not the file's path, is recorded as a run's command
    main()
