"""``python -m ebpo_core.cli``, for launchers such as ``accelerate launch -m``."""

import sys

from ebpo_core.cli import main

sys.exit(main())
