"""What every package stands on: errors, strict settings, command line, files, progress.

Imports nothing of ours and no MindSpore.
"""
