"""A run without running it: its ranks' shapes and bytes, read off the meta device, and what it would send."""

from abyssal.train.dry_run.run import DryRun, dry_run

__all__ = ["DryRun", "dry_run"]
