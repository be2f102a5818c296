"""`python -m hubgen.cli`: the `hubgen` command where it is not on the path."""

import sys

from hubgen.cli import main

sys.exit(main())
