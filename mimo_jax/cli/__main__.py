"""`python -m mimo_jax.cli`, which is `mimo`."""

import sys

from mimo_jax.cli.main import main

sys.exit(main())
