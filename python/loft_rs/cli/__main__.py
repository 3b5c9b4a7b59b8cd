"""`python -m loft_rs.cli` is `loft-rs`."""

import sys

from .main import main

sys.exit(main())
