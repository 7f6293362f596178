"""Cached datasets that the tests of the recipe share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for lora_training.py beside this file
