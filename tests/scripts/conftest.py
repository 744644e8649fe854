"""Scripts import their siblings by plain names, as `python scripts/x.py` lets them; the tests do the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
