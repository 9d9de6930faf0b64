"""`python -m flash_dmattn_hf.cli` is `flash-dmattn`."""

import sys

from flash_dmattn_hf.cli import main

sys.exit(main())
