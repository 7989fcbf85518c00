"""What every package builds on: errors, strict settings, command line, files, progress.

Imports no other package of this repository and no MindSpore.
"""
