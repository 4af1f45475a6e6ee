"""refiner_min: the reference implementation of Refiner-ViT that one can read in an evening.

Start with model.py, or with the notebooks. What every command of the package shares is here.
"""

import sys

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake that its user can mend, said in one sentence: what was wrong, with the value, and what to do."""


def run_command(main):
    """Run a command's main(); a UserError is one sentence and exit status 2, Ctrl-C is 130, neither a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
