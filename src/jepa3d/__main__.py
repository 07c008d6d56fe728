"""The command line as a module: `python -m jepa3d`, or `torchrun -m jepa3d` for several processes."""

import sys

from jepa3d.cli import main

if __name__ == "__main__":  # false in worker processes, which import this file by another name
    sys.argv[0] = "jepa3d"  # this name, not the file's path, is recorded as a run's command
    main()
