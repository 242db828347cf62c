"""One HTML page about one run or several, with nothing to download: curves, expert load, samples, recipes. No torch."""
