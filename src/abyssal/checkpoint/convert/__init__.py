"""From one model directory to another in a different number format, within a few blocks of memory."""

from abyssal.checkpoint.convert.manifest import MANIFEST, verify_directory
from abyssal.checkpoint.convert.plan import Conversion
from abyssal.checkpoint.convert.run import Outcome, Progress, convert_directory

__all__ = ["MANIFEST", "Conversion", "Outcome", "Progress", "convert_directory", "verify_directory"]
