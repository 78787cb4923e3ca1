"""Makes probe_cases importable (pytest's importlib mode leaves the tests' folders off sys.path)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
