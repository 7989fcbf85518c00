"""The replay: all ranks of a layout executed in NumPy, in lock-step, against one device."""
