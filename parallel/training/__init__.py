"""How any model is run: settings, command line, trainer, optimizers, checkpoints, launch."""
