"""What every package stands on: errors, strict settings, command line, files, progress.

Imports no other package of this repository and no MindSpore.
"""
