"""`python -m vdu_fast.cli`, for a checkout without the console script."""

import sys

from vdu_fast.cli import main

sys.exit(main())
