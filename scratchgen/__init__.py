"""scratchgen: a variational autoencoder and a diffusion model of FashionMNIST, from scratch in NumPy.

README.md has the order in which to read these files. What one reads stands at the top of this package; what one need
not read stands in two wings, ``machinery`` and ``evaluate``.
"""

import sys
import traceback


def quiet_imports(kind, error, trace, hook=sys.excepthook):
    """A sys.excepthook: `hook`, but for a KeyboardInterrupt in the body of a module other than the main program's."""
    names = [(frame.f_code.co_name, frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(trace)]
    if issubclass(kind, KeyboardInterrupt) and any(f == "<module>" and name != "__main__" for f, name in names):
        print("stopped before it began", file=sys.stderr)
    else:
        hook(kind, error, trace)


sys.excepthook = quiet_imports  # Ctrl-C while modules are being imported, which takes a second, is one line

from scratchgen.machinery import blas  # noqa: E402, F401  before all others, since it must act before NumPy is loaded
