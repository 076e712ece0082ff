"""`python -m fxrank`."""

import sys

from fxrank.cli import main

sys.exit(main())
