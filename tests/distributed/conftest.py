"""The drivers of other processes lie beside the tests that read what they wrote."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "cli"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
