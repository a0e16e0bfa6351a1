from __future__ import annotations

import sys
from pathlib import Path

# So that "peculiar_nets:Picky" can be asked for as a user would ask for a model of their own.
sys.path.insert(0, str(Path(__file__).parent))
