"""What every HTTP server here shares: limits, reading of bodies, JSON, errors, queue, metrics, drain, reload.

Does not know any model. The rankers' server and the language model's are built on it.
"""
