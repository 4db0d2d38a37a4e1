"""`python -m fedray` is `fedray`."""

import sys

from fedray.cli import main

sys.exit(main())
