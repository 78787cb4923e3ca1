"""``python -m fastasync``."""

import sys

from fastasync.cli import main

sys.exit(main())
