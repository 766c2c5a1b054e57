"""`python -m twofold`."""

import sys

from twofold.cli.main import main

sys.exit(main())
