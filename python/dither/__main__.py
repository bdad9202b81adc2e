"""`python -m dither`."""

import sys

from .cli import main

sys.exit(main())
