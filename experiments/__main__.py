"""`python -m experiments` is the command `nested`."""

import sys

from experiments.cli import main

sys.exit(main())
