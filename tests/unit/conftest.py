from __future__ import annotations

import sys
from pathlib import Path

# Helper modules lie beside the tests, which importlib mode does not put on the path.
sys.path.append(str(Path(__file__).parent))
