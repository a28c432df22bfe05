"""``python -m ebpo_core.fusionroute.cli``, for launchers such as ``accelerate launch -m``."""

import sys

from ebpo_core.fusionroute.cli import main

sys.exit(main())
