"""`python -m fp8_kernels` is the `fp8-kernels` command."""

import sys

from .cli import main

sys.exit(main())
