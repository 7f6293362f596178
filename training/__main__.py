"""``python -m flux2_kit.training``: the command line, in the form that ``accelerate launch -m`` starts."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
