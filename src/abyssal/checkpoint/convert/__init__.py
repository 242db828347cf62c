"""From one model directory to another in a different number format, within a few blocks of memory."""

from abyssal.checkpoint.convert.manifest import MANIFEST, verify_directory
from abyssal.checkpoint.convert.plan import Conversion
from abyssal.checkpoint.convert.run import ConversionProgress, ConversionResult, convert_directory

__all__ = ["MANIFEST", "Conversion", "ConversionProgress", "ConversionResult", "convert_directory", "verify_directory"]
