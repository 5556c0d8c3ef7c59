"""`python -m flexijax` is the command line."""

import sys

from flexijax.cli.main import main

sys.exit(main())
