"""`python -m fxrank`."""

import sys

from fxrank.cli.main import main

sys.exit(main())
