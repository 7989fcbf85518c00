"""How any model is trained: settings, data sources, trainer, backends, steps, optimizers, schedules."""
