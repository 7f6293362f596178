"""``python -m flux2_kit.flux2_core``: the core's commands, in the form that ``accelerate launch -m`` starts."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
