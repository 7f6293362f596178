"""Lets the tests import `lora_training.py`, which lies beside them and is not on importlib mode's path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
