"""`python -m fastgrpo` is `fastgrpo`."""

import sys

from .cli import main

sys.exit(main())
