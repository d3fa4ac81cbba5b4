"""The verbs of the command line: each module adds one to a parser, and runs it.

Heavy packages are imported inside the functions that run, so that `--help` stays fast.
"""
