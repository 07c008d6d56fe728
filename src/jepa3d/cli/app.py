"""The program: every command's settings, errors and exit status in one place."""

import cyclopts
from cyclopts import Parameter

import jepa3d

app = cyclopts.App(
    name="jepa3d",
    help="Self-supervised learning on 3D point clouds with 3D-JEPA (arXiv 2409.15803).",
    version=lambda: jepa3d.__version__,  # read when it is asked for: that takes a while
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
    suppress_keyboard_interrupt=False,
)
