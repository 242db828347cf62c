"""Files and folders on disk: whole or not at all, locked, checked, and a sentence for every fault of the system."""
