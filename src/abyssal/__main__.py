"""`python -m abyssal`: the command line."""

from abyssal.cli.main import run

run()
