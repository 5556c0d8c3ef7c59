"""`python -m flexijax` is the command line."""

import sys

from flexijax.cli import main

sys.exit(main())
