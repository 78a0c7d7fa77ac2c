"""With this folder on PYTHONPATH, every Python process rounds its updates otherwise."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from rounding import round_updates_otherwise

round_updates_otherwise(1)
