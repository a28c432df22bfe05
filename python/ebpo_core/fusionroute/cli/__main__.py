"""``python -m ebpo_core.cli.fusionroute``, for launchers such as ``accelerate launch -m``."""

import sys

from ebpo_core.cli.fusionroute import main

sys.exit(main())
