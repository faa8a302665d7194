"""``python -m kubeai.mock_engine``."""

import sys

from kubeai.mock_engine import main

sys.exit(main(sys.argv[1:]))
